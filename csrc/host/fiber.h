// Fibers: the threads of a CUDA block as contexts of one OS thread, switched by hand. x86-64 has its own
// switch (a few ns); every other machine uses ucontext. AddressSanitizer is told of each switch.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) or defined(DSC_FIBER_UCONTEXT)
#include <ucontext.h>
#define DSC_FIBER_USES_UCONTEXT 1
#else
#define DSC_FIBER_USES_UCONTEXT 0
#endif

namespace dsc::host {

// A mapping with a guard page below: a kernel that overflows its stack dies there, not in a neighbour's
// frame.
class Stack {
  public:
    Stack();
    ~Stack();
    Stack(Stack&& other) noexcept;
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    std::byte* bottom() const { return bottom_; }
    static size_t size();

  private:
    std::byte* bottom_;
};

class Fiber {
  public:
    using Entry = void (*)(void* argument);

    // Makes the fiber run entry(argument) on `stack` when it is first switched to; entry must not return, and
    // whatever the stack held before is lost.
    void start(const Stack& stack, Entry entry, void* argument);

    // Leaves this fiber, which must be the running one, and runs `next`; returns when somebody switches back.
    void switch_to(Fiber& next);

  private:
    static void run(Fiber* self);

    Entry entry_ = nullptr;
    void* argument_ = nullptr;
#if DSC_FIBER_USES_UCONTEXT
    ucontext_t context_;
#else
    void* stack_pointer_ = nullptr;
#endif
    const void* stack_bottom_ = nullptr;  // null for the fiber of the OS thread until it has been left once
    size_t stack_size_ = 0;
};

}  // namespace dsc::host
