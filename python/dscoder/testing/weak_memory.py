"""Programs of several actors over shared memory, run in every order that a weak memory allows.

Words hold data and are read and written plainly; flags are atomic. A plain store may stay unseen and a plain
load may see what is old as long as nothing orders them: what an actor must see of another is what a release
of that one, and an acquire that read this release, have carried over, directly or by way of a third. Each
actor keeps that as a clock, the last step of every other actor that it must see. An access to a word beside a
write, or a write beside a read, that the clock does not hold could come out either way. That is a mistake:
a data race, which PTX gives no meaning. A flag's reader may see any value that is not older than one it must
see. So stores drain in any order but for releases, and each actor may see them in an order of its own, which
is weaker than buffers of stores.

`explore` visits every state that can be reached, breadth first: the story of a mistake is a shortest one.
Plain accesses go in one with their actor's step ahead of them, since whether they race does not depend on who
else moves in between; so do several stores to, or looks at, flags, since each may be seen, or see, as if
it were late or early. Otherwise every order is taken. Programs only run forward, so there are finitely many.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from dscoder.testing.pipeline import BrokenError
from dscoder.testing.weak_memory_states import (
    Clock,
    Entry,
    State,
    Word,
    is_behind,
    oldest,
    rounded,
    shortened_flag,
    shortened_word,
)
from dscoder.testing.weak_memory_steps import (
    Actor,
    Await,
    Count,
    Load,
    Meet,
    Set,
    Step,
    Value,
    Write,
    flags_of,
    told,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mishaps:
    """What may go wrong: a rank that may die at any step, and waits that may end in vain at any time.

    Where waits are not hasty, one ends in vain only when a rank has died and nobody else can go on, since
    limits are long; where nobody has died, that nobody can go on is a mistake.
    """

    mortal: int = -1
    is_hasty: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Explored:
    """How much there was to see, and (records, dead) of every end."""

    num_states: int
    num_moves: int
    ends: frozenset[tuple[tuple[int, ...], int]]


class World:
    """The actors, and every step that any of them can make from a state."""

    def __init__(self, actors: Sequence[Actor], mishaps: Mishaps) -> None:
        self.actors, self.mishaps = list(actors), mishaps
        steps = [
            (idx, place, step) for idx, actor in enumerate(actors) for place, step in enumerate(actor.program)
        ]
        self.words = _numbered(step.word for _, _, step in steps if isinstance(step, Write | Load))
        self.flags = _numbered(flag for _, _, step in steps for flag in flags_of(step))
        # Which actors touch a word or flag, and their last steps that do.
        word_users: list[dict[int, int]] = [{} for _ in self.words]
        flag_users: list[dict[int, int]] = [{} for _ in self.flags]
        for idx, place, step in steps:
            if isinstance(step, Write | Load):
                word_users[self.words[step.word]][idx] = place
            for flag in () if isinstance(step, Set) else flags_of(step):
                flag_users[self.flags[flag]][idx] = place
        self.word_users = [list(users.items()) for users in word_users]
        self.flag_users = [list(users.items()) for users in flag_users]
        self.nobody = (0,) * len(actors)
        self.mates = [[i for i, actor in enumerate(actors) if actor.stream == own.stream] for own in actors]

    def start(self) -> State:
        """Everything is zero, and known to all."""
        num_ranks = 1 + max(actor.rank for actor in self.actors)
        state = State(
            places=self.nobody,
            clocks=(self.nobody,) * len(self.actors),
            words=(Word(0, (0, 0), ()),) * len(self.words),
            flags=((Entry((0, 0), (0, 0), self.nobody),),) * len(self.flags),
            records=(-1,) * num_ranks,
            dead=-1,
        )
        for idx in range(len(self.actors)):
            state = self.advance(state, idx, 0)
        return self.shortened(state)

    def lives(self, state: State, idx: int) -> bool:
        """Whether the actor has something left to do."""
        actor = self.actors[idx]
        return state.places[idx] < len(actor.program) and actor.rank != state.dead

    def next_step(self, state: State, idx: int) -> Step:
        """Of an actor that lives."""
        return self.actors[idx].program[state.places[idx]]

    def said(self, state: State, idx: int) -> str:
        """What the actor does next, for a story."""
        return f"{self.actors[idx].name} {told(self.next_step(state, idx))}"

    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        """Every step from here, and what it leads to; BrokenError for one that must not happen.

        Nobody can go on where all waits last though all stores have been seen: what is old may be seen, but
        nobody can count on it.
        """
        alive = [idx for idx in range(len(self.actors)) if self.lives(state, idx)]
        for idx in alive:
            for following in self.steps_of(state, idx):
                yield self.said(state, idx), following
        is_stuck = all(self.waits(state, idx) for idx in alive)
        may_give_up = self.mishaps.is_hasty or (is_stuck and state.dead >= 0)
        given_up = [move for idx in alive if may_give_up for move in self.vain_waits(state, idx)]
        if is_stuck and alive and not given_up:
            raise BrokenError("nobody can go on: " + "; ".join(self.said(state, idx) for idx in alive))
        if alive and self.mishaps.mortal >= 0 and state.dead < 0:
            yield f"rank {self.mishaps.mortal} dies", state._replace(dead=self.mishaps.mortal)
        yield from given_up

    def waits(self, state: State, idx: int) -> bool:
        """Whether the actor cannot go on when it sees all that was stored."""
        step = self.next_step(state, idx)
        if not isinstance(step, Await):
            return isinstance(step, Meet)
        has_failed = step.failed is not None and self.newest(state, step.failed)[0] != 0
        pairs = zip(step.flags, step.values, strict=True)
        return not has_failed and any(self.newest(state, flag)[0] != value[0] for flag, value in pairs)

    def newest(self, state: State, flag: str) -> Value:
        """The flag's last value."""
        return state.flags[self.flags[flag]][-1].value

    def vain_waits(self, state: State, idx: int) -> Iterator[tuple[str, State]]:
        """A wait that ends because it has lasted too long; the first of a rank is recorded."""
        step = self.next_step(state, idx)
        if not isinstance(step, Await) or step.failed is None:
            return
        for peer, (flag, value) in enumerate(zip(step.flags, step.values, strict=True)):
            if self.newest(state, flag)[0] != value[0] or self.mishaps.is_hasty:
                yield f"{self.said(state, idx)}, and gives up on {peer}", self.fail(state, idx, step, peer)

    def fail(self, state: State, idx: int, step: Await, peer: int) -> State:
        """A thread of the block has waited for this peer too long."""
        assert step.failed is not None
        rank = self.actors[idx].rank
        if not state.flags[self.flags[step.failed]][-1].value[0]:
            state = state._replace(records=_replaced(state.records, rank, peer))
            state = self.put(state, idx, step.failed, (1, 0), self.nobody)
        return self.advance(state, idx, step.if_failed)

    def advance(self, state: State, idx: int, place: int | None = None) -> State:
        """The actor stands behind its step, or where it jumps to, and has made the plain accesses there.

        If it comes last to where all blocks of its stream meet, they all go on.
        """
        place = state.places[idx] + 1 if place is None else place
        state = self.touch_all(state._replace(places=_replaced(state.places, idx, place)), idx)
        mates = self.mates[idx]
        while all(self.lives(state, i) and isinstance(self.next_step(state, i), Meet) for i in mates):
            state = self.cross(state, mates)
        return state

    def steps_of(self, state: State, idx: int) -> Iterator[State]:
        """What the actor's next step can lead to; nothing while it waits."""
        match step := self.next_step(state, idx):
            case Set():
                carries = self.released(state, idx) if step.is_release else self.nobody
                for flag, value in zip(step.flags, step.values, strict=True):
                    state = self.put(state, idx, flag, value, carries)
                yield self.advance(state, idx)
            case Await():
                yield from self.look(state, idx, step)
            case Count():
                yield self.count(state, idx, step)

    # ---- words ----

    def touch_all(self, state: State, idx: int) -> State:
        """The plain accesses that are next."""
        while self.lives(state, idx) and isinstance(step := self.next_step(state, idx), Write | Load):
            state = self.touch(state, idx, step)
        return state

    def touch(self, state: State, idx: int, step: Write | Load) -> State:
        """One of them: nothing that it may not be beside can be beside it."""
        where, here, clock = self.words[step.word], state.places[idx] + 1, state.clocks[idx]
        word, name = state.words[where], self.actors[idx].name
        if not is_behind(clock, idx, word.written):
            writer = self.actors[word.written[0]].name
            raise BrokenError(f"{name} {told(step)}, and {writer} may not be done writing {word.value}")
        if isinstance(step, Load):
            if step.value not in (None, word.value):
                raise BrokenError(f"{name} {told(step)}, and finds {word.value}")
            others = [read for read in word.reads if read[0] != idx]
            word = Word(word.value, word.written, tuple(sorted([*others, (idx, here)])))
        else:
            beside = [self.actors[read[0]].name for read in word.reads if not is_behind(clock, idx, read)]
            if beside:
                raise BrokenError(
                    f"{name} {told(step)}, and {beside[0]} may not be done reading {word.value}"
                )
            word = Word(step.value, (idx, here), ())
        return state._replace(
            places=_replaced(state.places, idx, here), words=_replaced(state.words, where, word)
        )

    # ---- flags ----

    def released(self, state: State, idx: int) -> Clock:
        """All that the actor has seen, and done."""
        return _replaced(state.clocks[idx], idx, state.places[idx] + 1)

    def put(self, state: State, idx: int, flag: str, value: Value, carries: Clock) -> State:
        """The flag's newest value."""
        where = self.flags[flag]
        entry = Entry(value, (idx, state.places[idx] + 1), carries)
        return state._replace(flags=_replaced(state.flags, where, (*state.flags[where], entry)))

    def visible(self, state: State, idx: int, flag: str) -> tuple[Entry, ...]:
        """The flag's values that the actor may see."""
        history = state.flags[self.flags[flag]]
        return history[oldest(state.clocks[idx], idx, history) :]

    def look(self, state: State, idx: int, step: Await) -> Iterator[State]:
        """All flags show what is waited for, or the rank is seen to have failed.

        That they are looked at at one time is no loss: each thread may as well see what was there before.
        """
        may_go_on = True
        if step.failed is not None:
            seen = {entry.value[0] for entry in self.visible(state, idx, step.failed)}
            may_go_on = 0 in seen
            if 1 in seen:
                yield self.advance(state, idx, step.if_failed)
        found = [
            [entry for entry in self.visible(state, idx, flag) if entry.value[0] == value[0]]
            for flag, value in zip(step.flags, step.values, strict=True)
        ]
        for entries in product(*found) if may_go_on else ():
            yield self.met(state, idx, step, entries)

    def met(self, state: State, idx: int, step: Await, entries: Sequence[Entry]) -> State:
        """The spins end at these values."""
        seen = tuple(entry.value for entry in entries)
        if seen != step.values:
            raise BrokenError(f"{self.said(state, idx)}, and sees {seen}")
        clock = state.clocks[idx]
        if step.is_acquire:
            clock = tuple(map(max, clock, *(entry.carries for entry in entries)))
            clock = _replaced(clock, idx, 0)
        return self.advance(state._replace(clocks=_replaced(state.clocks, idx, clock)), idx)

    def count(self, state: State, idx: int, step: Count) -> State:
        """The newest value is read and written in one."""
        newest = state.flags[self.flags[step.flag]][-1]
        number, carries = newest.value[0] + 1, newest.carries
        if step.is_ordered:
            clock = _replaced(tuple(map(max, state.clocks[idx], carries)), idx, 0)
            state = state._replace(clocks=_replaced(state.clocks, idx, clock))
            carries = tuple(map(max, self.released(state, idx), carries))
        is_last = number == step.last
        state = self.put(state, idx, step.flag, (0 if is_last and step.resets else number, 0), carries)
        return self.advance(state, idx, None if is_last else step.if_not_last)

    # ---- kernels ----

    def cross(self, state: State, mates: Sequence[int]) -> State:
        """The next kernel of a stream begins: all its blocks see what any of them has."""
        all_seen = tuple(map(max, self.nobody, *(self.released(state, i) for i in mates)))
        clocks, places = list(state.clocks), list(state.places)
        for mate in mates:
            clocks[mate] = _replaced(all_seen, mate, 0)
            places[mate] += 1
        state = state._replace(clocks=tuple(clocks), places=tuple(places))
        for mate in mates:
            state = self.touch_all(state, mate)
        return state

    # ---- the same state, told in one way ----

    def shortened(self, state: State) -> State:
        """Without what nobody can ask for any more, so that states that cannot be told apart are one.

        dscoder.testing.weak_memory_states says how.
        """
        places = [
            place if self.lives(state, idx) else len(self.actors[idx].program)
            for idx, place in enumerate(state.places)
        ]
        known: list[set[int]] = [{0} for _ in places]
        words = tuple(
            shortened_word(word, [i for i, last in users if places[i] <= last], state.clocks, known)
            for word, users in zip(state.words, self.word_users, strict=True)
        )
        flags = [
            shortened_flag(history, [i for i, last in users if places[i] <= last], state.clocks, known)
            for history, users in zip(state.flags, self.flag_users, strict=True)
        ]
        steps = [sorted(found, reverse=True) for found in known]
        clocks = tuple(
            rounded(clock, steps) if place < len(actor.program) else self.nobody
            for clock, place, actor in zip(state.clocks, places, self.actors, strict=True)
        )
        for where, history in enumerate(flags):
            if any(any(entry.carries) for entry in history):
                flags[where] = tuple(
                    Entry(entry.value, entry.written, rounded(entry.carries, steps)) for entry in history
                )
        return state._replace(clocks=clocks, words=words, flags=tuple(flags))


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: idx for idx, name in enumerate(dict.fromkeys(names))}


def _replaced(values: tuple[Any, ...], idx: int, value: Any) -> tuple[Any, ...]:
    return (*values[:idx], value, *values[idx + 1 :])


def explore(actors: Sequence[Actor], mishaps: Mishaps | None = None, *, most: int = 1_000_000) -> Explored:
    """Every state; BrokenError with a shortest story of what must not happen, a wait without end too."""
    world = World(actors, mishaps or Mishaps())
    states, origins = [world.start()], [(-1, "")]
    seen, todo = {states[0]}, deque([0])
    num_moves, ends = 0, set()
    while todo:
        here = todo.popleft()
        state = states[here]
        try:
            found = list(world.moves(state))
        except BrokenError as error:
            raise BrokenError(story(origins, here, str(error))) from None
        for label, following in found:
            following = world.shortened(following)
            if following in seen:
                continue
            seen.add(following)
            todo.append(len(states))
            states.append(following)
            origins.append((here, label))
        num_moves += len(found)
        if not any(world.lives(state, idx) for idx in range(len(actors))):
            ends.add((state.records, state.dead))
        if len(states) > most:
            raise ValueError(f"explore: more than {most} states")
    return Explored(num_states=len(states), num_moves=num_moves, ends=frozenset(ends))


def story(origins: Sequence[tuple[int, str]], here: int, end: str) -> str:
    """All steps from the start, a line each, and what happens then."""
    lines = [end]
    while here > 0:
        here, label = origins[here]
        lines.append(label)
    return "\n".join(reversed(lines))
