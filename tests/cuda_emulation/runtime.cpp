// Runs a kernel block by block on one host thread: a CUDA thread is a fiber that runs until it meets others.
//
// Tensors stand between pages that may not be touched and shared memory starts as NaN, so that an access outside of
// them ends the launch or shows in the result; copies by cp.async happen when they are waited for and not before.

#include "device.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

constexpr size_t PAGE = 4096;
constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t SHARED_BYTES = 227 * 1024;  // of a block on sm_90
alignas(PAGE) unsigned char shared_memory[SHARED_BYTES + PAGE];
uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

struct Meeting {
  int size = 0, arrived = 0;
  long generation = 0;
  const void* operands[32];
  void* results[32];
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  jmp_buf context;
  bool started, finished;
  const Meeting* awaited;
  long generation;  // of `awaited` when this fiber arrived
  std::deque<std::vector<Copy>> copies;  // one entry a group, the last one open
};

std::vector<Fiber> fibers;
std::vector<Meeting> warps;
Meeting block;
unsigned current;
jmp_buf scheduler;
ucontext_t start_context;
sigjmp_buf failure;
std::string message;
void (*kernel)(void**);
void** kernel_arguments;

void arrive(Meeting& meeting) {
  const long generation = meeting.generation;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  Fiber& fiber = fibers[current];
  fiber.awaited = &meeting;
  fiber.generation = generation;
  if (!_setjmp(fiber.context)) _longjmp(scheduler, 1);
}

void run_fiber() {
  kernel(kernel_arguments);
  fibers[current].finished = true;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&start_context);
  start_context.uc_stack.ss_sp = fiber.stack.get();
  start_context.uc_stack.ss_size = STACK_BYTES;
  makecontext(&start_context, run_fiber, 0);
  setcontext(&start_context);
}

}  // namespace

void fail(const char* what) {
  message = std::string(what) + ", in thread " + std::to_string(threadIdx.x) + " of block " +
            std::to_string(blockIdx.x);
  siglongjmp(failure, 1);
}

void meet_warp(const void* operands, void* result, Collective compute, int parameter) {
  Meeting& warp = warps[current / 32];
  warp.operands[current % 32] = operands;
  warp.results[current % 32] = result;
  if (warp.arrived == 31) compute(warp.operands, warp.results, parameter);
  arrive(warp);
}

void __syncthreads() { arrive(block); }

void cp_async_16(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16)) {
    fail("cp.async between addresses that are not multiples of 16");
  }
  fibers[current].copies.back().push_back({to, from, bytes});
}

void cp_async_commit() { fibers[current].copies.emplace_back(); }

void wait_for_copies(int pending) {
  auto& copies = fibers[current].copies;
  for (; copies.size() > static_cast<size_t>(pending) + 1; copies.pop_front()) {
    for (const Copy& copy : copies.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

namespace {

// One warp as far as it comes while the others stand still: warps are never closer than their barriers keep them.
bool run_warp(unsigned warp, bool backwards, unsigned& left) {
  bool ran = false;
  for (bool progress = true; progress; ran |= progress) {
    progress = false;
    for (unsigned i = 0; i < 32; ++i) {
      current = 32 * warp + (backwards ? 31 - i : i);
      Fiber& fiber = fibers[current];
      if (fiber.finished || (fiber.awaited && fiber.awaited->generation == fiber.generation)) continue;
      threadIdx = {current, 0, 0};
      progress = true;
      resume(fiber);
      left -= fibers[current].finished;
    }
  }
  return ran;
}

void run_block(bool backwards) {
  const unsigned threads = blockDim.x;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    fiber.started = fiber.finished = false;
    fiber.awaited = nullptr;
    fiber.copies.assign(1, {});
  }
  warps.assign(threads / 32, {});
  for (Meeting& warp : warps) warp.size = 32;
  block = {};
  block.size = threads;
  for (unsigned left = threads; left;) {
    bool progress = false;
    for (unsigned i = 0; i < warps.size(); ++i) {
      progress |= run_warp(backwards ? warps.size() - 1 - i : i, backwards, left);
    }
    if (!progress) fail("a barrier that not every thread reaches");
  }
}

// A copy of a tensor that ends where a page begins that may not be touched, as does the page before it.
class Guarded {
 public:
  Guarded(void* tensor, size_t bytes) : tensor_(tensor), bytes_(bytes), pages_((bytes + PAGE - 1) / PAGE * PAGE) {
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, pages_ + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + PAGE, pages_, PROT_READ | PROT_WRITE);
    std::memset(base_ + PAGE, 0xff, pages_ - bytes);  // NaN
    std::memcpy(address(), tensor, bytes);
  }
  ~Guarded() { munmap(base_, pages_ + 2 * PAGE); }
  Guarded(const Guarded&) = delete;

  unsigned char* address() const { return base_ + PAGE + pages_ - bytes_; }
  bool copy_back() const {
    std::memcpy(tensor_, address(), bytes_);
    for (const unsigned char* byte = base_ + PAGE; byte < address(); ++byte) {
      if (*byte != 0xff) return false;
    }
    return true;
  }

 private:
  void* tensor_;
  size_t bytes_, pages_;
  unsigned char* base_;
};

void on_bad_access(int) { fail("an access outside of every tensor"); }

}  // namespace

// Blocks first to last - 1 of a grid. arguments: slots of 8 bytes each; sizes: bytes of the tensor that a slot points
// to, or -1 where it is a number or an address to take as it is. Empty where all went well, else what went wrong.
extern "C" const char* emulate(
    void (*launched)(void**), const uint64_t* arguments, const int64_t* sizes, int count, unsigned grid,
    unsigned first, unsigned last, unsigned threads, size_t shared_bytes, bool backwards) {
  message.clear();
  std::deque<Guarded> tensors;
  std::vector<uint64_t> slots(arguments, arguments + count);
  std::vector<void*> pointers;
  for (int i = 0; i < count; ++i) {
    if (sizes[i] >= 0 && slots[i]) {
      tensors.emplace_back(reinterpret_cast<void*>(slots[i]), sizes[i]);
      slots[i] = reinterpret_cast<uint64_t>(tensors.back().address());
    }
    pointers.push_back(&slots[i]);
  }
  kernel = launched;
  kernel_arguments = pointers.data();
  blockDim = {threads, 1, 1};
  gridDim = {grid, 1, 1};
  std::vector<char> signal_stack(4 * SIGSTKSZ);
  stack_t alternate{signal_stack.data(), 0, signal_stack.size()}, before_stack;
  struct sigaction action = {}, before_segv, before_bus;
  action.sa_handler = on_bad_access;
  action.sa_flags = SA_ONSTACK | SA_NODEFER;
  sigaltstack(&alternate, &before_stack);
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  if (!sigsetjmp(failure, 1)) {
    for (unsigned i = first; i < last; ++i) {
      blockIdx = {i, 0, 0};
      std::memset(shared_memory, 0xff, sizeof(shared_memory));
      run_block(backwards);
      for (size_t byte = shared_bytes; byte < sizeof(shared_memory); ++byte) {
        if (shared_memory[byte] != 0xff) fail("a write past the shared memory of the launch");
      }
    }
  }
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  sigaltstack(&before_stack, nullptr);
  for (const Guarded& tensor : tensors) {
    if (!tensor.copy_back() && message.empty()) message = "a write in front of a tensor";
  }
  return message.c_str();
}
