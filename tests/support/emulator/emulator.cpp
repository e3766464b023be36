// One kernel's blocks, one after the other, each as 128 fibers.
//
// Built with the kernel's own -D options and -DDIFFDISTILL_EMULATOR, -DKERNELS="the .cu file".
#include KERNELS
#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <vector>

namespace emulator {
Index thread, block;
unsigned char* shared_memory;
Lane lanes[1024];

namespace {
constexpr int THREADS_OF_BLOCK = 128, WARPS = THREADS_OF_BLOCK / 32, STACK = 256 * 1024;
constexpr int GUARD = 64, UNIT = 16, NOBODY = -1, SEVERAL = -2;

struct Copy {
    void* to;
    const void* from;
    bool valid;
};
// Who used 16 bytes of shared memory, and between which barriers: two threads that nothing keeps apart, one of which
// writes, are a race, whatever came out of it here.
struct Use {
    int writer = NOBODY, written = -1, reader = NOBODY, read = -1;  // threads, and the turns in which they did it
    bool in_flight = false;                                         // a copy that its thread has not waited for
};
struct Fiber {
    ucontext_t context;  // to begin with; from then on jumps, which ask the system for nothing
    jmp_buf here;
    std::vector<char> stack;
    bool begun, done, at_barrier;
    std::vector<std::vector<Copy>> groups;  // the last one is open
};
Fiber fibers[THREADS_OF_BLOCK];
jmp_buf scheduler;
int current, shared_bytes;
bool reversed_warps, copies_early;
int met_in_warp[WARPS], warp_turn[WARPS], met_in_block, block_turn;
std::function<void()> body;
std::vector<Use> uses;

void stop(const char* why) {
    fprintf(stderr, "thread %u of block %u: %s\n", thread.x, block.x, why);
    abort();
}
Use& use_of(const void* p) { return uses[(static_cast<const unsigned char*>(p) - shared_memory) / UNIT]; }

void pause() {
    if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}
void go_on() {
    Fiber& fiber = fibers[current];
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}
void enter() {
    body();
    fibers[current].done = true;
    pause();
}
}  // namespace

void meet_warp() {
    int warp = thread.x / 32, turn = warp_turn[warp];
    if (++met_in_warp[warp] == 32) {
        met_in_warp[warp] = 0;
        ++warp_turn[warp];
    } else {
        while (warp_turn[warp] == turn) pause();
    }
}
void meet_block() {
    int turn = block_turn;
    if (++met_in_block == THREADS_OF_BLOCK) {
        met_in_block = 0;
        ++block_turn;
        for (auto& fiber : fibers) fiber.at_barrier = false;
    } else {
        fibers[current].at_barrier = true;
        while (block_turn == turn) pause();
    }
}
static void check(const void* p) {
    auto* at = static_cast<const unsigned char*>(p);
    bool is_inside = at >= shared_memory && at + UNIT <= shared_memory + shared_bytes;
    if (!is_inside || reinterpret_cast<uintptr_t>(at) % UNIT) stop("outside of shared memory, or not aligned");
}
void read_row(const void* p) {
    check(p);
    Use& use = use_of(p);
    if (use.in_flight) stop("reads what is still being copied");
    if (use.writer != static_cast<int>(thread.x) && use.written == block_turn) stop("reads a copy before a barrier");
    bool is_first = use.read != block_turn || use.reader == static_cast<int>(thread.x);
    use.reader = is_first ? thread.x : SEVERAL;
    use.read = block_turn;
}
void check_banks(const void* const (&rows)[8]) {
    unsigned seen = 0;
    for (auto* row : rows) seen |= 1u << reinterpret_cast<uintptr_t>(row) / UNIT % 8;
    if (seen != 0xff) stop("rows of a matrix in the same banks");
}
static void copy(const Copy& copy) { copy.valid ? memcpy(copy.to, copy.from, UNIT) : memset(copy.to, 0, UNIT); }
void queue_copy(void* to, const void* from, bool valid) {
    check(to);
    if (reinterpret_cast<uintptr_t>(from) % UNIT) stop("copies from an address that is not aligned");
    Use& use = use_of(to);
    int me = thread.x;
    if (use.in_flight) stop("copies to where another copy is on its way");
    if (use.read == block_turn && use.reader != me) stop("copies over what another thread reads before a barrier");
    if (use.written == block_turn && use.writer != me) stop("copies over another thread's copy before a barrier");
    use.in_flight = true;
    use.writer = me;
    if (copies_early) copy({to, from, valid});
    fibers[current].groups.back().push_back({to, from, valid});
}
void close_group() { fibers[current].groups.emplace_back(); }
void wait_for_groups(int pending) {
    auto& groups = fibers[current].groups;  // the open one is not waited for
    while (static_cast<int>(groups.size()) - 1 > pending) {
        for (auto& waiting : groups.front()) {
            if (!copies_early) copy(waiting);
            use_of(waiting.to).in_flight = false;
            use_of(waiting.to).written = block_turn;
        }
        groups.erase(groups.begin());
    }
}

namespace {
// Lets a warp's fibers go on until all of them wait for other warps. Returns whether any of them got further.
bool run_warp(int warp) {
    for (bool moved = false;; moved = true) {
        int turns = warp_turn[warp] + block_turn, waiting = 0, waited = 0;
        for (int i = warp * 32; i < warp * 32 + 32; ++i) {
            waited += fibers[i].done || fibers[i].at_barrier;
            if (fibers[i].done || fibers[i].at_barrier) continue;
            current = i;
            thread.x = i;
            go_on();
        }
        for (int i = warp * 32; i < warp * 32 + 32; ++i) waiting += fibers[i].done || fibers[i].at_barrier;
        if (turns == warp_turn[warp] + block_turn && waiting == waited) return moved;
    }
}

void run_block() {
    memset(shared_memory, 0xff, shared_bytes);  // NaN in either type
    uses.assign(shared_bytes / UNIT, {});
    met_in_block = block_turn = 0;
    memset(met_in_warp, 0, sizeof met_in_warp);
    for (auto& fiber : fibers) {
        fiber.stack.resize(STACK);
        fiber.begun = fiber.done = fiber.at_barrier = false;
        fiber.groups.assign(1, {});
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < WARPS; ++i) moved |= run_warp(reversed_warps ? WARPS - 1 - i : i);
    }
    for (auto& fiber : fibers)
        if (!fiber.done) {
            fprintf(stderr, "block %u: not every thread reaches a barrier\n", block.x);
            abort();
        }
}

void run(int blocks, int bytes, int order, std::function<void()> kernel) {
    reversed_warps = order & 1;
    copies_early = order & 2;
    std::vector<unsigned char> memory(bytes + GUARD);
    shared_memory = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    shared_bytes = bytes;
    body = kernel;
    for (block.x = 0; block.x < static_cast<unsigned>(blocks); ++block.x) run_block();
}
}  // namespace
}  // namespace emulator

// arguments: as a launch gives them to the GPU.  blocks, bytes: of the launch.  order: +1: the last warp goes first; +2:
// a copy arrives at once.
extern "C" void run_forward(const ForwardArguments* a, int blocks, int bytes, int order) {
    emulator::run(blocks, bytes, order, [=] { attention_forward(*a); });
}
extern "C" void run_tangent(const TangentArguments* a, int blocks, int bytes, int order) {
    emulator::run(blocks, bytes, order, [=] { attention_tangent(*a); });
}
#if HEAD_SIZE <= 160
extern "C" void run_difference(const DifferenceArguments* a, int blocks, int bytes, int order) {
    emulator::run(blocks, bytes, order, [=] { attention_difference(*a); });
}
#endif
