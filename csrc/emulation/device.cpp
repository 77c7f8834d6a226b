// Fibers, and the scheduler that runs a block's threads on them. See device.h.
// FASTNET_UCONTEXT makes it switch stacks as it does on processors other than x86-64.

#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <memory>

#include <sys/mman.h>

#if !defined(__x86_64__) || defined(FASTNET_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// Works on what the sanitizers must take for the hardware's own, not for a thread's accesses.
#define FASTNET_HARDWARE __attribute__((no_sanitize("thread")))

namespace fastnet::emulation {
namespace {

constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxBlocks = 8;      // of a cluster
constexpr size_t kStackBytes =
    256 * 1024;  // sanitizers make frames large; untouched pages cost none

// ---------------------------------------------------------------------------------------------
// A stack to run on, and switching between two

void fiber_main();

#if defined(__x86_64__) && !defined(FASTNET_UCONTEXT)

// Saves what a called function must keep on the stack, and changes stacks.
extern "C" void fastnet_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden fastnet_switch_stack
.globl fastnet_switch_stack
.type fastnet_switch_stack, @function
fastnet_switch_stack:
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
.size fastnet_switch_stack, .-fastnet_switch_stack
)");

struct Context {
  void* stack_pointer = nullptr;
  FASTNET_HARDWARE void prepare(char* stack) {
    // As if fiber_main had been about to be returned to: six registers, and its address.
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  FASTNET_HARDWARE void switch_to(Context& other) {
    fastnet_switch_stack(&stack_pointer, other.stack_pointer);
  }
};

#else

struct Context {
  ucontext_t context;
  FASTNET_HARDWARE void prepare(char* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &fiber_main, 0);
  }
  FASTNET_HARDWARE void switch_to(Context& other) { swapcontext(&context, &other.context); }
};

#endif

enum class State { ready, at_warp_barrier, at_block_barrier, at_cluster_barrier, left };

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* sanitizer = nullptr;  // ThreadSanitizer's view of it, or AddressSanitizer's fake stack
  ThreadState thread;
  State state = State::ready;
  Where where;
  unsigned mask = 0;
  uint64_t given = 0;
  // For ThreadSanitizer, an address for every other barrier: a thread may be at the next one before
  // another has gone on from this one, which must not see what happened in between.
  char arrived[2];
  unsigned arrivals = 0, block_arrivals = 0, cluster_arrivals = 0;
  unsigned partners_parity = 0;  // which of its addresses each lane used
};

// What a warp's lanes hand each other, from when all are there until all are at the next exchange.
struct Warp {
  uint64_t values[32];
};

struct Block {
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / 32];
  std::unique_ptr<char[]> shared;
  char at_barrier[2];  // addresses for ThreadSanitizer
};

struct Device {
  Block cluster[kMaxBlocks];
  int blocks = 0, threads = 0;  // of a cluster, and of each of its blocks
  Context scheduler;
  void* scheduler_sanitizer = nullptr;
  Block* block = nullptr;  // and the fiber of it that runs
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  char cluster_begun, cluster_ended, at_barrier[2];  // addresses for ThreadSanitizer
};

// Not thread-safe: kernels are launched from one thread at a time, as tests do.
Device device;

// ---------------------------------------------------------------------------------------------
// What the sanitizers are told

void release([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#endif
}
void acquire([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#endif
}

FASTNET_HARDWARE void switch_to_fiber(Block& block, Fiber& fiber) {
  device.block = &block;
  device.running = &fiber;
#if defined(__SANITIZE_THREAD__)
  device.scheduler_sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
  device.scheduler.switch_to(fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

FASTNET_HARDWARE void switch_to_scheduler() {
  Fiber& fiber = *device.running;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(device.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.state == State::left ? nullptr : &fiber.sanitizer,
                                 scheduler_stack, scheduler_stack_bytes);
#endif
  fiber.context.switch_to(device.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.sanitizer, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

FASTNET_HARDWARE void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  // Two addresses: through one, a thread that ends would be ordered before one that begins.
  acquire(&device.cluster_begun);
  (*device.body)();
  release(&device.cluster_ended);
  device.running->state = State::left;
  switch_to_scheduler();
  std::abort();  // a fiber that has left is not run again
}

// ---------------------------------------------------------------------------------------------
// Barriers

// A thread's number in its block.
FASTNET_HARDWARE int index_of(const Fiber& fiber) {
  const dim3 size = fiber.thread.block_dim;
  const uint3 at = fiber.thread.thread;
  return static_cast<int>((at.z * size.y + at.y) * size.x + at.x);
}

[[noreturn]] FASTNET_HARDWARE void fail(const char* what, const Fiber& one, const Fiber& other) {
  const uint3 block = one.thread.block;
  std::fprintf(stderr,
               "fastnet emulation: %s in block (%u, %u, %u): thread %d waits at %s:%u, thread %d ",
               what, block.x, block.y, block.z, index_of(one), one.where.file_name(),
               one.where.line(), index_of(other));
  if (other.state == State::left) {
    std::fprintf(stderr, "has left the kernel\n");
  } else {
    std::fprintf(stderr, "at %s:%u\n", other.where.file_name(), other.where.line());
  }
  std::fflush(stderr);
  std::abort();
}

FASTNET_HARDWARE bool same_place(const Fiber& one, const Fiber& other) {
  return one.state == other.state && one.where.line() == other.where.line() &&
         one.where.column() == other.where.column() && one.mask == other.mask;
}

// Lets the threads of a barrier of `count` blocks go on once all are there. Returns whether they
// could.
FASTNET_HARDWARE bool release_blocks(Block* blocks, int count, State barrier) {
  for (int b = 0; b < count; ++b) {
    for (int i = 0; i < device.threads; ++i) {
      if (blocks[b].fibers[i].state != barrier) return false;
    }
  }
  for (int b = 0; b < count; ++b) {
    for (int i = 0; i < device.threads; ++i) {
      if (!same_place(blocks[0].fibers[0], blocks[b].fibers[i])) {
        fail("divergent barrier", blocks[0].fibers[0], blocks[b].fibers[i]);
      }
    }
  }
  for (int b = 0; b < count; ++b) {
    for (int i = 0; i < device.threads; ++i) blocks[b].fibers[i].state = State::ready;
  }
  return true;
}

FASTNET_HARDWARE bool release_warps(Block& block) {
  bool any = false;
  for (int first = 0; first < device.threads; first += 32) {
    for (int i = first; i < first + 32 && i < device.threads; ++i) {
      Fiber& fiber = block.fibers[i];
      if (fiber.state != State::at_warp_barrier) continue;
      bool complete = true;
      for (int lane = 0; lane < 32; ++lane) {
        // Lanes that a block's last warp lacks are taken to be there.
        if (!(fiber.mask >> lane & 1) || first + lane >= device.threads) continue;
        complete = complete && same_place(fiber, block.fibers[first + lane]);
      }
      if (!complete) continue;
      const unsigned mask = fiber.mask;
      unsigned parity = 0;
      for (int lane = 0; lane < 32 && first + lane < device.threads; ++lane) {
        parity |= (block.fibers[first + lane].arrivals & 1) << lane;
      }
      for (int lane = 0; lane < 32 && first + lane < device.threads; ++lane) {
        if (!(mask >> lane & 1)) continue;
        block.fibers[first + lane].partners_parity = parity;
        block.fibers[first + lane].state = State::ready;
        block.warps[first / 32].values[lane] = block.fibers[first + lane].given;
      }
      any = true;
    }
  }
  return any;
}

FASTNET_HARDWARE bool release_barriers() {
  bool any = release_blocks(device.cluster, device.blocks, State::at_cluster_barrier);
  for (int b = 0; b < device.blocks; ++b) {
    Block& block = device.cluster[b];
    const bool all = release_blocks(&block, 1, State::at_block_barrier);
    any = all || release_warps(block) || any;
  }
  return any;
}

FASTNET_HARDWARE void report_deadlock() {
  // A barrier of few threads is what those of many wait for.
  for (const State barrier :
       {State::at_warp_barrier, State::at_block_barrier, State::at_cluster_barrier}) {
    for (int b = 0; b < device.blocks; ++b) {
      for (int i = 0; i < device.threads; ++i) {
        const Fiber& waiting = device.cluster[b].fibers[i];
        if (waiting.state != barrier) continue;
        for (int c = 0; c < device.blocks; ++c) {
          for (int j = 0; j < device.threads; ++j) {
            const Fiber& other = device.cluster[c].fibers[j];
            const bool expected = barrier == State::at_cluster_barrier ||
                                  (b == c && (barrier == State::at_block_barrier ||
                                              (i / 32 == j / 32 && (waiting.mask >> j % 32 & 1))));
            if (expected && !same_place(waiting, other)) {
              fail("divergent barrier", waiting, other);
            }
          }
        }
      }
    }
  }
  std::abort();
}

FASTNET_HARDWARE void run_cluster() {
  release(&device.cluster_begun);
  int left = 0;
  while (left < device.blocks * device.threads) {
    bool ran = false;
    for (int b = 0; b < device.blocks; ++b) {
      Block& block = device.cluster[b];
      for (int i = 0; i < device.threads; ++i) {
        if (block.fibers[i].state != State::ready) continue;
        switch_to_fiber(block, block.fibers[i]);
        left += block.fibers[i].state == State::left;
        ran = true;
      }
    }
    if (!release_barriers() && !ran) report_deadlock();
  }
  acquire(&device.cluster_ended);
}

FASTNET_HARDWARE void make_fibers(Block& block) {
  for (Fiber* fiber = block.fibers; fiber < block.fibers + device.threads; ++fiber) {
    if (fiber->stack) continue;
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    fiber->stack = static_cast<char*>(stack);
#if defined(__SANITIZE_THREAD__)
    fiber->sanitizer = __tsan_create_fiber(0);
#endif
  }
}

FASTNET_HARDWARE void prepare(Block& block, uint3 at, dim3 grid, dim3 size) {
  for (int number = 0; number < device.threads; ++number) {
    Fiber& fiber = block.fibers[number];
    const unsigned i = static_cast<unsigned>(number);
    fiber.thread.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    fiber.thread.block = at;
    fiber.thread.block_dim = size;
    fiber.thread.grid_dim = grid;
    fiber.state = State::ready;
    fiber.arrivals = fiber.block_arrivals = fiber.cluster_arrivals = 0;
    fiber.context.prepare(fiber.stack);
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------

FASTNET_HARDWARE const ThreadState& current() {
  return device.running->thread;
}

FASTNET_HARDWARE int lane() {
  return index_of(*device.running) % 32;
}

FASTNET_HARDWARE void* dynamic_shared() {
  return device.block->shared.get();
}

FASTNET_HARDWARE int cluster_rank() {
  return static_cast<int>(device.block - device.cluster);
}

FASTNET_HARDWARE void* shared_of(void* mine, int rank) {
  const ptrdiff_t at = static_cast<char*>(mine) - device.block->shared.get();
  return device.cluster[rank].shared.get() + at;
}

FASTNET_HARDWARE void run(dim3 grid, dim3 block, size_t shared_bytes,
                          const std::function<void()>& body, int cluster) {
  const unsigned threads = block.x * block.y * block.z;
  // The limits of every device from compute capability 7.5 on, and for clusters, from 9.0 on.
  const size_t most_shared = cluster > 0 ? kClusterSharedBytes : 48 * 1024;
  const int blocks = cluster > 0 ? cluster : 1;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 ||
      blocks > kMaxBlocks || grid.x % static_cast<unsigned>(blocks) != 0 ||
      shared_bytes > most_shared) {
    std::fprintf(stderr,
                 "fastnet emulation: no device launches grid (%u, %u, %u) in clusters of %d, block "
                 "(%u, %u, %u) with %zu bytes of shared memory\n",
                 grid.x, grid.y, grid.z, cluster, block.x, block.y, block.z, shared_bytes);
    std::abort();
  }
  device.blocks = blocks;
  device.threads = static_cast<int>(threads);
  device.body = &body;
  for (int b = 0; b < blocks; ++b) {
    make_fibers(device.cluster[b]);
    // Exactly as large as asked for, so that AddressSanitizer sees where it ends.
    device.cluster[b].shared.reset(shared_bytes ? new char[shared_bytes] : nullptr);
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += static_cast<unsigned>(blocks)) {
        for (int b = 0; b < blocks; ++b) {
          prepare(device.cluster[b], {x + static_cast<unsigned>(b), y, z}, grid, block);
        }
        run_cluster();
      }
    }
  }
  for (int b = 0; b < blocks; ++b) device.cluster[b].shared.reset();
}

// At a barrier of a block, or of a cluster: `addresses` are its own, `arrivals` the thread's count.
FASTNET_HARDWARE static void wait_for_all(State barrier, char* addresses, unsigned* arrivals,
                                          const Where& where) {
  Fiber& fiber = *device.running;
  fiber.state = barrier;
  fiber.where = where;
  fiber.mask = 0;
  char* const address = &addresses[(*arrivals)++ & 1];
  release(address);
  switch_to_scheduler();
  acquire(address);
}

FASTNET_HARDWARE void block_barrier(const Where& where) {
  wait_for_all(State::at_block_barrier, device.block->at_barrier, &device.running->block_arrivals,
               where);
}

FASTNET_HARDWARE void cluster_barrier(const Where& where) {
  wait_for_all(State::at_cluster_barrier, device.at_barrier, &device.running->cluster_arrivals,
               where);
}

FASTNET_HARDWARE static void wait_for_warp(unsigned mask, const Where& where) {
  Fiber& fiber = *device.running;
  if (!(mask >> lane() & 1)) {
    std::fprintf(stderr, "fastnet emulation: lane %d is not in its own mask 0x%08x at %s:%u\n",
                 lane(), mask, where.file_name(), where.line());
    std::abort();
  }
  fiber.state = State::at_warp_barrier;
  fiber.where = where;
  fiber.mask = mask;
  switch_to_scheduler();
}

FASTNET_HARDWARE void warp_barrier(unsigned mask, const Where& where) {
  Fiber& fiber = *device.running;
  ++fiber.arrivals;
  release(&fiber.arrived[fiber.arrivals & 1]);
  wait_for_warp(mask, where);
  const int first = index_of(fiber) / 32 * 32;
  for (int i = 0; i < 32 && first + i < device.threads; ++i) {
    if (mask >> i & 1)
      acquire(&device.block->fibers[first + i].arrived[fiber.partners_parity >> i & 1]);
  }
}

// Registers change hands, memory is not ordered: nothing is released or acquired.
FASTNET_HARDWARE uint64_t exchange(unsigned mask, uint64_t mine, int source, const Where& where,
                                   uint64_t* all) {
  const int present = device.threads - index_of(*device.running) / 32 * 32;  // a block's last warp
  if (present < 32) mask &= (1u << present) - 1;
  device.running->given = mine;
  wait_for_warp(mask, where);
  const Warp& warp = device.block->warps[index_of(*device.running) / 32];
  if (all) {
    for (int i = 0; i < 32; ++i) all[i] = mask >> i & 1 ? warp.values[i] : 0;
  }
  // What a lane outside the mask would give is undefined on the device; here, one's own value.
  return source >= 0 && source < 32 && (mask >> source & 1) ? warp.values[source] : mine;
}

}  // namespace fastnet::emulation
