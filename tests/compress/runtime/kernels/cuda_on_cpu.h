// Enough of CUDA C++ to run our kernels on a CPU: each thread of a block is a fiber, blocks run one after another.
//
// A fiber runs until it waits at a barrier (of the block, or of the lanes of a shuffle), then the next one does. Shared memory is
// static, as only one block is alive. Functions of the kernels that are one instruction of a GPU are here in C++ instead
// (`conftest.py` takes theirs out). What this cannot show: overlap of kernels, memory order, speed.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>

using std::max;
using std::min;

#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __restrict__
#define __launch_bounds__(x)
#define __expf(x) expf(x)  // glibc has a function of that name

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) ushort4 {
    unsigned short x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct Index {
    unsigned x, y;
};
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }

// ---- threads of a block --------------------------------------------------------------------------------

static const int MOST = 1024, STACK = 128 << 10;
static Index threadIdx, blockIdx, blockDim, gridDim;
static ucontext_t scheduler, fibers[MOST];
static char* stacks[MOST];
static bool ended[MOST];
static int current, alive;
static std::function<void()> body;

struct Barrier {
    int arrived;
    unsigned turn;
};
static Barrier whole, lanes[MOST];

static void pause_until(const Barrier& barrier, unsigned turn) {
    while (barrier.turn == turn) swapcontext(&fibers[current], &scheduler);
}

static void arrive(Barrier& barrier, int count) {
    const unsigned turn = barrier.turn;
    if (++barrier.arrived < count) return pause_until(barrier, turn);
    barrier.arrived = 0;
    ++barrier.turn;
}

static void __syncthreads() {
    const unsigned turn = whole.turn;  // of threads that have not returned, whose number may fall while we wait
    if (++whole.arrived < alive) return pause_until(whole, turn);
    whole.arrived = 0;
    ++whole.turn;
}

static void among(unsigned mask) { arrive(lanes[current / 32 * 32 + __builtin_ctz(mask)], __builtin_popcount(mask)); }

static void fiber() {
    body();
    ended[current] = true;
    if (--alive && whole.arrived == alive) {
        whole.arrived = 0;
        ++whole.turn;
    }
    swapcontext(&fibers[current], &scheduler);
}

static void run_block(int threads) {
    alive = threads;
    whole = {};
    for (int t = 0; t < threads; ++t) {
        lanes[t] = {};
        ended[t] = false;
        if (!stacks[t]) stacks[t] = static_cast<char*>(malloc(STACK));
        getcontext(&fibers[t]);
        fibers[t].uc_stack.ss_sp = stacks[t];
        fibers[t].uc_stack.ss_size = STACK;
        makecontext(&fibers[t], fiber, 0);
    }
    for (int rounds = 0; alive; ++rounds) {
        if (rounds > 100000) {
            fprintf(stderr, "threads wait for each other for ever\n");
            abort();
        }
        for (int t = 0; t < threads; ++t) {
            if (ended[t]) continue;
            current = threadIdx.x = t;
            swapcontext(&scheduler, &fibers[t]);
        }
    }
}

template <class... A, size_t... I>
void with_arguments(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(args[I])...);
}

template <class... A>
void launch(void (*kernel)(A...), unsigned blocks, unsigned blocks_y, unsigned threads, void** args) {
    body = [=] { with_arguments(kernel, args, std::index_sequence_for<A...>{}); };
    gridDim = {blocks, blocks_y};
    blockDim = {threads, 1};
    for (blockIdx.y = 0; blockIdx.y < blocks_y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(threads);
}

// ---- what CUDA has built in --------------------------------------------------------------------------

static char slots[MOST][16];

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    memcpy(slots[current], &value, sizeof value);
    among(mask);
    T out;
    memcpy(&out, slots[current ^ distance], sizeof out);
    among(mask);
    return out;
}

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

static float rsqrtf(float x) { return 1.f / sqrtf(x); }
static float __int_as_float(int i) { return same_bits<float>(i); }
static unsigned __float_as_uint(float f) { return same_bits<unsigned>(f); }
static int atomicAdd(int* at, int value) { return *at += value, *at - value; }
static void atomicMax(unsigned long long* at, unsigned long long value) { *at = max(*at, value); }
static void __threadfence() {}

static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

// ---- what our kernels have as one instruction ---------------------------------------------------------

static float to_float(unsigned short half) { return same_bits<_Float16>(half); }
static unsigned short to_half(float f) { return same_bits<unsigned short>((_Float16)f); }
static unsigned and_or(unsigned a, unsigned mask, unsigned bits) { return (a & mask) | bits; }
static float of_pair(unsigned pair, int i) { return to_float((unsigned short)(pair >> 16 * i)); }
static unsigned pair(float low, float high) { return to_half(low) | (unsigned)to_half(high) << 16; }
static unsigned sub2(unsigned a, unsigned b) { return pair(of_pair(a, 0) - of_pair(b, 0), of_pair(a, 1) - of_pair(b, 1)); }
static unsigned mul2(unsigned a, unsigned b) { return pair(of_pair(a, 0) * of_pair(b, 0), of_pair(a, 1) * of_pair(b, 1)); }
static unsigned fma2(unsigned a, unsigned b, unsigned c) {
    return pair(of_pair(a, 0) * of_pair(b, 0) + of_pair(c, 0), of_pair(a, 1) * of_pair(b, 1) + of_pair(c, 1));
}

// mma.m16n8k16: lane 4 g + q holds rows g and g + 8 of a, column g of b and columns 2 q, 2 q + 1 of c.
static struct {
    unsigned a[4], b[2];
} operands[MOST];

static void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    memcpy(operands[current].a, a, sizeof a);
    operands[current].b[0] = b0;
    operands[current].b[1] = b1;
    among(0xffffffff);
    const auto* warp = operands + current / 32 * 32;
    const int g = (current & 31) >> 2, q = current & 3;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k)
            c[i] += of_pair(warp[g * 4 + k % 8 / 2].a[(i >> 1) + 2 * (k / 8)], k & 1) *
                    of_pair(warp[(2 * q + (i & 1)) * 4 + k % 8 / 2].b[k / 8], k & 1);
    among(0xffffffff);
}

static uint4 stream_in(const uint4* from) { return *from; }
static float fresh(const float* at) { return *at; }
static float2 from_others(const float* at) { return {at[0], at[1]}; }
