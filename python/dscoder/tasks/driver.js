// Runs an answer in JavaScript apart from its tests, as driver.py does in Python. What functions of the answer
// return is copied into the process of the tests, so that nothing of the answer runs there.
'use strict';

const childProcess = require('node:child_process');
const fs = require('node:fs');
const v8 = require('node:v8');

const REQUESTS = 3; // descriptors of the answer's process
const REPLIES = 4;
const GONE = Symbol('the answer has left');

function readExactly(file, size) {
  const found = Buffer.alloc(size);
  for (let filled = 0; filled < size; ) {
    const count = fs.readSync(file, found, filled, size - filled, null);
    if (count === 0) return null;
    filled += count;
  }
  return found;
}

function receive(file) {
  const size = readExactly(file, 4);
  const message = size && readExactly(file, size.readUInt32LE(0));
  return message ? v8.deserialize(message) : GONE;
}

function send(file, value) {
  const body = v8.serialize(value);
  const message = Buffer.alloc(4 + body.length);
  message.writeUInt32LE(body.length, 0);
  body.copy(message, 4);
  for (let written = 0; written < message.length; ) written += fs.writeSync(file, message, written);
}

// ---- the answer's process ----

function replyTo(run) {
  try {
    send(REPLIES, { value: run() });
  } catch (error) {
    send(REPLIES, { error: String((error && error.stack) || error) });
  }
}

function serve() {
  let answer;
  for (let args = receive(REQUESTS); args !== GONE; args = receive(REQUESTS)) {
    replyTo(() => {
      if (answer !== undefined) return answer(...args);
      answer = require('./answer.js');
    });
  }
}

// ---- the tests' process ----

function take(name) {
  const content = fs.readFileSync(name, 'utf8');
  fs.unlinkSync(name);
  return content;
}

// Both ends of a pipe whose reads and writes wait, which those that node makes do not.
function newPipe(name) {
  childProcess.execFileSync('mkfifo', [name]);
  const both = fs.openSync(name, 'r+'); // so that neither of the next two waits for the other
  const ends = [fs.openSync(name, 'r'), fs.openSync(name, 'w')];
  fs.closeSync(both);
  fs.unlinkSync(name);
  return ends;
}

function main(name) {
  const [requestsOut, requests] = newPipe('requests');
  const [replies, repliesIn] = newPipe('replies');
  const worker = childProcess.spawn(process.execPath, [...process.execArgv, __filename], {
    stdio: ['ignore', 'inherit', 'inherit', requestsOut, repliesIn],
  });
  for (const end of [requestsOut, repliesIn]) fs.closeSync(end);
  const mark = take('mark');
  const tests = take('tests.js');
  const ask = (...args) => {
    send(requests, args);
    const reply = receive(replies);
    if (reply === GONE) throw GONE;
    if (reply.error !== undefined) throw new Error(reply.error);
    return reply.value;
  };
  try {
    ask();
    new Function('require', name, tests)(require, ask);
  } catch (error) {
    if (error !== GONE && error.code !== 'EPIPE') throw error;
    fs.writeSync(2, 'the answer left before its tests ended\n');
    worker.on('exit', (code, signal) => (signal ? process.kill(process.pid, signal) : process.exit(code || 1)));
    return;
  }
  worker.kill('SIGKILL');
  fs.writeSync(1, `\n${mark}\n`);
  process.exit(0);
}

if (process.argv.length > 2) main(process.argv[2]);
else serve();
