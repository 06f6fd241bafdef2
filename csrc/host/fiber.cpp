#include "host/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define DSC_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DSC_ASAN 1
#endif
#endif
#ifndef DSC_ASAN
#define DSC_ASAN 0
#endif
#if DSC_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !DSC_FIBER_USES_UCONTEXT
// dsc_fiber_switch(void** save, void* load): pushes the registers that a callee must keep, stores the stack
// pointer in *save, takes `load` as the stack pointer and pops that fiber's registers. A fresh fiber's stack
// is laid out by Fiber::start as if it had been left here, returning into dsc_fiber_entry with the two
// arguments in r12 and r13.
extern "C" void dsc_fiber_switch(void** save, void* load);
extern "C" void dsc_fiber_entry();
asm(R"(
.text
.align 16
.type dsc_fiber_switch, @function
.hidden dsc_fiber_switch
.globl dsc_fiber_switch
dsc_fiber_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size dsc_fiber_switch, .-dsc_fiber_switch
.align 16
.type dsc_fiber_entry, @function
.hidden dsc_fiber_entry
.globl dsc_fiber_entry
dsc_fiber_entry:
    movq %r13, %rdi
    call *%r12
    ud2
.size dsc_fiber_entry, .-dsc_fiber_entry
)");
#endif

namespace dsc::host {
namespace {

size_t page_size() {
    static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
}

// The fiber that was left by the latest switch: the one that is entered learns from it whose stack it came
// from.
Fiber* g_left = nullptr;

// Stacks are whole pages, so their hot ends would all compete for the same few lines of the first-level
// cache.
size_t colour(const Stack& stack) {
    constexpr size_t kNumColours = 32, kLineBytes = 64;
    return reinterpret_cast<uintptr_t>(stack.bottom()) / (page_size() + Stack::size()) % kNumColours *
           kLineBytes;
}

}  // namespace

size_t Stack::size() {
    // Sanitized frames are several times larger: every local array has red zones.
    return DSC_ASAN ? 256 * 1024 : 64 * 1024;
}

Stack::Stack() {
    void* const mapping = mmap(nullptr, page_size() + size(), PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(mapping, page_size(), PROT_NONE) != 0) throw std::bad_alloc();
    bottom_ = static_cast<std::byte*>(mapping) + page_size();
}

Stack::Stack(Stack&& other) noexcept : bottom_(other.bottom_) {
    other.bottom_ = nullptr;
}

Stack::~Stack() {
    if (bottom_ != nullptr) munmap(bottom_ - page_size(), page_size() + size());
}

void Fiber::start(const Stack& stack, Entry entry, void* argument) {
    entry_ = entry;
    argument_ = argument;
    stack_bottom_ = stack.bottom();
    stack_size_ = Stack::size();
#if DSC_ASAN
    // The frames of the stack's last user may have been left without unwinding their red zones.
    __asan_unpoison_memory_region(stack.bottom(), Stack::size());
#endif
#if DSC_FIBER_USES_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom();
    context_.uc_stack.ss_size = Stack::size();
    context_.uc_link = nullptr;
    // makecontext passes ints only: the pointer travels in two halves.
    const auto bits = reinterpret_cast<uintptr_t>(this);
    constexpr auto enter = [](unsigned high, unsigned low) {
        run(reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low));
    };
    makecontext(&context_, reinterpret_cast<void (*)()>(+enter), 2, static_cast<unsigned>(bits >> 32),
                static_cast<unsigned>(bits));
#else
    // From low to high: r15 r14 r13 r12 rbx rbp, the return address, then 16 bytes: the call in
    // dsc_fiber_entry must start on a 16-byte boundary.
    auto* const top = reinterpret_cast<uintptr_t*>(stack.bottom() + Stack::size() - colour(stack));
    uintptr_t* const frame = top - 9;
    frame[0] = frame[1] = frame[4] = frame[5] = 0;  // rbp = 0 ends every stack walk here
    frame[2] = reinterpret_cast<uintptr_t>(this);
    frame[3] = reinterpret_cast<uintptr_t>(&Fiber::run);
    frame[6] = reinterpret_cast<uintptr_t>(&dsc_fiber_entry);
    stack_pointer_ = frame;
#endif
}

void Fiber::run(Fiber* self) {
#if DSC_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &g_left->stack_bottom_, &g_left->stack_size_);
#endif
    self->entry_(self->argument_);
    std::abort();
}

void Fiber::switch_to(Fiber& next) {
    g_left = this;
#if DSC_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, next.stack_bottom_, next.stack_size_);
#endif
#if DSC_FIBER_USES_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    dsc_fiber_switch(&stack_pointer_, next.stack_pointer_);
#endif
#if DSC_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, &g_left->stack_bottom_, &g_left->stack_size_);
#endif
}

}  // namespace dsc::host
