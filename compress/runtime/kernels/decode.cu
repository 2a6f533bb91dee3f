// What a decode step does between its linears: norms, rotary embedding, the cache, attention of one query, the gate.
//
// The residual stream is float32, everything that a linear reads or writes float16. Lengths and positions are read on the device,
// so that a captured graph serves every step.
//
// Set by the compiler's command line: SIZE (of a head, a multiple of 64), HEADS (query heads of one key head that a block
// takes, at most 4), CHUNK (positions a block takes).

typedef unsigned int u32;
typedef unsigned short half_bits;

__device__ __forceinline__ float to_float(half_bits h) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(h));
    return out;
}

__device__ __forceinline__ half_bits to_half(float f) {
    half_bits out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(f));
    return out;
}

// Programmatic dependent launch: a kernel starts while the one before it ends, and waits where it needs that one's results.
// What an earlier kernel writes is no const __restrict__ here: that may be read at any time, before the wait too.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffff, v, d);
    return v;
}

__device__ __forceinline__ float block_sum(float v) {
    __shared__ float parts[33];
    v = warp_sum(v);
    if (!(threadIdx.x & 31)) parts[threadIdx.x >> 5] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        float w = threadIdx.x < (blockDim.x >> 5) ? parts[threadIdx.x] : 0.f;
        w = warp_sum(w);
        if (!threadIdx.x) parts[32] = w;
    }
    __syncthreads();
    return parts[32];
}

__device__ __forceinline__ float block_max(float v) {
    __shared__ float parts[33];
#pragma unroll
    for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, d));
    if (!(threadIdx.x & 31)) parts[threadIdx.x >> 5] = v;
    __syncthreads();
    if (!threadIdx.x) {
        float w = parts[0];
        for (int i = 1; i < (blockDim.x >> 5); i++) w = fmaxf(w, parts[i]);
        parts[32] = w;
    }
    __syncthreads();
    return parts[32];
}

// Each row to INT8 and back, in place: q = round(x * (127 / largest)), ties to even, x = q * (largest / 127). What a linear with INT8
// inputs computes from (`compress.activations`, by token, symmetric). One block of whole warps a row.
extern "C" __global__ void round_rows(half_bits* __restrict__ x, int size) {
    wait_for_earlier_kernels();
    half_bits* row = x + (long long)blockIdx.x * size;
    float largest = 0.f;
    for (int i = threadIdx.x; i < size; i += blockDim.x) largest = fmaxf(largest, fabsf(to_float(row[i])));
    largest = block_max(largest);
    const float inverse = largest > 0.f ? 127.f / largest : 0.f, step = largest / 127.f;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        row[i] = to_half(fminf(fmaxf(rintf(to_float(row[i]) * inverse), -128.f), 127.f) * step);
    }
}

// The same with zero points: step = (high - low) / 255, zero = round(-128 - low / step), q = clamp(round(x / step) + zero),
// x = (q - zero) * step; a row of equal values takes its own size for the step.
extern "C" __global__ void round_rows_with_zeros(half_bits* __restrict__ x, int size) {
    wait_for_earlier_kernels();
    half_bits* row = x + (long long)blockIdx.x * size;
    float high = -65504.f, low = 65504.f;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const float v = to_float(row[i]);
        high = fmaxf(high, v);
        low = fminf(low, v);
    }
    high = block_max(high);
    low = -block_max(-low);
    float step = (high - low) / 255.f, zero = 0.f;
    if (step > 0.f) {
        zero = rintf(-128.f - low / step);
    } else {
        step = low == 0.f ? 1.f : fabsf(low);
    }
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        row[i] = to_half((fminf(fmaxf(rintf(to_float(row[i]) / step) + zero, -128.f), 127.f) - zero) * step);
    }
}

// hidden += added (if any); out = hidden / rms(hidden) * weight. One block a row; size is a multiple of 4. The parameters' eps comes
// as the bits of a float. kept (if any): 1 / rms.
extern "C" __global__ void add_norm(float* __restrict__ hidden, const half_bits* added,
                                    const float* __restrict__ weight, half_bits* __restrict__ out, float* __restrict__ kept,
                                    int size, int eps_bits) {
    wait_for_earlier_kernels();
    float* row = hidden + (long long)blockIdx.x * size;
    const half_bits* more = added ? added + (long long)blockIdx.x * size : nullptr;
    float squares = 0.f;
    for (int i = threadIdx.x * 4; i < size; i += blockDim.x * 4) {
        float4 v = *reinterpret_cast<float4*>(row + i);
        if (more) {
            ushort4 a = *reinterpret_cast<const ushort4*>(more + i);
            v.x += to_float(a.x);
            v.y += to_float(a.y);
            v.z += to_float(a.z);
            v.w += to_float(a.w);
            *reinterpret_cast<float4*>(row + i) = v;
        }
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    const float factor = rsqrtf(block_sum(squares) / size + __int_as_float(eps_bits));
    if (kept && !threadIdx.x) kept[blockIdx.x] = factor;
    half_bits* to = out + (long long)blockIdx.x * size;
    for (int i = threadIdx.x * 4; i < size; i += blockDim.x * 4) {
        const float4 v = *reinterpret_cast<float4*>(row + i), w = *reinterpret_cast<const float4*>(weight + i);
        ushort4 o;
        o.x = to_half(v.x * factor * w.x);
        o.y = to_half(v.y * factor * w.y);
        o.z = to_half(v.z * factor * w.z);
        o.w = to_half(v.w * factor * w.w);
        *reinterpret_cast<ushort4*>(to + i) = o;
    }
}

// The largest logit of each sequence: best[b] becomes the largest of (ordered bits of the logit) << 32 | ~index, so that the
// first of equal ones wins. logits: half [B, size].
extern "C" __global__ void largest(const half_bits* logits, unsigned long long* __restrict__ best, int size) {
    wait_for_earlier_kernels();
    const int sequence = blockIdx.y;
    unsigned long long mine = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
        const u32 bits = __float_as_uint(to_float(logits[(long long)sequence * size + i]));
        const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        const unsigned long long found = (unsigned long long)ordered << 32 | (u32)~i;
        if (found > mine) mine = found;
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        const unsigned long long other = __shfl_xor_sync(0xffffffff, mine, d);
        if (other > mine) mine = other;
    }
    if (!(threadIdx.x & 31)) atomicMax(best + sequence, mine);
}

// The next step: takes over the ids that `largest` found, moves the positions on and clears `best`. One block.
extern "C" __global__ void advance(unsigned long long* __restrict__ best, long long* __restrict__ ids, int* __restrict__ position,
                                   int batch) {
    wait_for_earlier_kernels();
    for (int b = threadIdx.x; b < batch; b += blockDim.x) {
        ids[b] = (u32)~(u32)best[b];
        best[b] = 0;
        position[b] += 1;
    }
}

// hidden[b] = embedding[ids[b]], float32 from half. One block a sequence.
extern "C" __global__ void embed(const half_bits* __restrict__ embedding, const long long* ids,
                                 float* __restrict__ hidden, int size) {
    wait_for_earlier_kernels();
    const half_bits* from = embedding + ids[blockIdx.x] * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) hidden[(long long)blockIdx.x * size + i] = to_float(from[i]);
}

// One head of q, k or v of one sequence: norm (if there is a weight), rotation, and for k and v a place in the cache.
// qkv: half [B, (q_heads + 2 kv_heads) SIZE]; q: half [B, q_heads, SIZE]; caches: half [B, kv_heads, capacity, SIZE];
// cosines, sines: float [positions, SIZE / 2]; position: int [B].
extern "C" __global__ void rotate(const half_bits* qkv, half_bits* __restrict__ q, half_bits* __restrict__ keys,
                                  half_bits* __restrict__ values, const float* __restrict__ cosines,
                                  const float* __restrict__ sines, const float* __restrict__ q_norm,
                                  const float* __restrict__ k_norm, const int* position, int q_heads,
                                  int kv_heads, int capacity, int eps_bits) {
    wait_for_earlier_kernels();
    const int head = blockIdx.x % (q_heads + 2 * kv_heads), sequence = blockIdx.x / (q_heads + 2 * kv_heads);
    const int at = position[sequence], i = threadIdx.x;  // SIZE / 2 threads
    const half_bits* from = qkv + ((long long)sequence * (q_heads + 2 * kv_heads) + head) * SIZE;
    float low = to_float(from[i]), high = to_float(from[i + SIZE / 2]);
    const bool is_q = head < q_heads, is_k = !is_q && head < q_heads + kv_heads;
    const float* norm = is_q ? q_norm : is_k ? k_norm : nullptr;
    if (norm) {
        const float factor = rsqrtf(block_sum(low * low + high * high) / SIZE + __int_as_float(eps_bits));
        low *= factor * norm[i];
        high *= factor * norm[i + SIZE / 2];
    }
    half_bits* to;
    if (is_q)
        to = q + ((long long)sequence * q_heads + head) * SIZE;
    else {
        const int kv = (head - q_heads) % kv_heads;
        to = (is_k ? keys : values) + (((long long)sequence * kv_heads + kv) * capacity + at) * SIZE;
    }
    if (is_q || is_k) {
        const float c = cosines[(long long)at * (SIZE / 2) + i], s = sines[(long long)at * (SIZE / 2) + i];
        const float turned = low * c - high * s;
        high = high * c + low * s;
        low = turned;
    }
    to[i] = to_half(low);
    to[i + SIZE / 2] = to_half(high);
}

// Attention of one query a head over positions 0 .. position[b], CHUNK positions a block; `join` puts the chunks together.
// Eight lanes take a key together, so that a warp has four keys in hand. partial: float [B, q_heads, chunks, SIZE + 2]: the
// weighted sum of values, the largest score, the sum of weights.
#define OWN (SIZE / 8)  // elements of a head that a lane holds

__device__ __forceinline__ void attend_chunk(const float (&query)[HEADS][OWN], const half_bits* keys, const half_bits* values, int begin,
                                             int end, float* partial, int chunk, int chunks) {
    const int eighth = threadIdx.x & 7, four = threadIdx.x >> 3;  // 16 groups of eight lanes
    float sum[HEADS][OWN] = {}, largest[HEADS], total[HEADS] = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) largest[h] = -1e30f;
    for (int at = begin + four; at < end; at += 16) {
        const half_bits* k = keys + (long long)at * SIZE + eighth * OWN;
        const half_bits* v = values + (long long)at * SIZE + eighth * OWN;
        half_bits kept[OWN], held[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i += 8) {
            *reinterpret_cast<uint4*>(kept + i) = *reinterpret_cast<const uint4*>(k + i);
            *reinterpret_cast<uint4*>(held + i) = *reinterpret_cast<const uint4*>(v + i);
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float score = 0.f;
#pragma unroll
            for (int i = 0; i < OWN; ++i) score += query[h][i] * to_float(kept[i]);
            const unsigned mine = 0xffu << (threadIdx.x & 24);
            score += __shfl_xor_sync(mine, score, 4);
            score += __shfl_xor_sync(mine, score, 2);
            score += __shfl_xor_sync(mine, score, 1);
            const float top = fmaxf(largest[h], score);
            const float shrink = exp2f(largest[h] - top), weight = exp2f(score - top);
            largest[h] = top;
            total[h] = total[h] * shrink + weight;
#pragma unroll
            for (int i = 0; i < OWN; ++i) sum[h][i] = sum[h][i] * shrink + weight * to_float(held[i]);
        }
    }
    __shared__ float tops[HEADS][16], totals[HEADS][16], sums[16][SIZE];
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
        if (!eighth) tops[h][four] = largest[h], totals[h][four] = total[h];
    __syncthreads();
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        float top = -1e30f, all = 0.f;
        for (int g = 0; g < 16; ++g) top = fmaxf(top, tops[h][g]);
        for (int g = 0; g < 16; ++g) all += totals[h][g] * exp2f(tops[h][g] - top);
        const float shrink = exp2f(largest[h] - top);
#pragma unroll
        for (int i = 0; i < OWN; ++i) sums[four][eighth * OWN + i] = sum[h][i] * shrink;
        __syncthreads();
        float* out = partial + ((long long)h * chunks + chunk) * (SIZE + 2);
        for (int i = threadIdx.x; i < SIZE; i += 128) {
            float s = 0.f;
#pragma unroll
            for (int g = 0; g < 16; ++g) s += sums[g][i];
            out[i] = s;
        }
        if (!threadIdx.x) out[SIZE] = top, out[SIZE + 1] = all;
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(128)
    attend(const half_bits* q, const half_bits* keys, const half_bits* values,
           const int* position, float* __restrict__ partial, int q_heads, int kv_heads, int capacity, int chunks,
           int scale_bits) {
    wait_for_earlier_kernels();
    const int chunk = blockIdx.x % chunks;
    const int first_head = blockIdx.x / chunks % (q_heads / HEADS) * HEADS;
    const int sequence = blockIdx.x / chunks / (q_heads / HEADS);
    const int length = position[sequence] + 1, begin = chunk * CHUNK;
    const int end = min(length, begin + CHUNK);
    if (begin >= length) return;
    const int eighth = threadIdx.x & 7;
    const int kv = first_head / (q_heads / kv_heads);
    const long long base = ((long long)sequence * kv_heads + kv) * capacity * SIZE;
    const float scale = __int_as_float(scale_bits) * 1.44269504f;

    float query[HEADS][OWN];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        half_bits taken[OWN];
        const half_bits* from = q + ((long long)sequence * q_heads + first_head + h) * SIZE + eighth * OWN;
#pragma unroll
        for (int i = 0; i < OWN; i += 8) *reinterpret_cast<uint4*>(taken + i) = *reinterpret_cast<const uint4*>(from + i);
#pragma unroll
        for (int i = 0; i < OWN; ++i) query[h][i] = to_float(taken[i]) * scale;
    }
    float* out = partial + ((long long)sequence * q_heads + first_head) * chunks * (SIZE + 2);
    attend_chunk(query, keys + base, values + base, begin, end, out, chunk, chunks);
}

// out: half [B, q_heads SIZE], from the chunks that hold positions. One block a head, SIZE threads.
extern "C" __global__ void join(const float* partial, const int* position, half_bits* __restrict__ out,
                                int q_heads, int chunks) {
    wait_for_earlier_kernels();
    const int sequence = blockIdx.x / q_heads;
    const int used = position[sequence] / CHUNK + 1;
    const float* mine = partial + (long long)blockIdx.x * chunks * (SIZE + 2);
    float top = -1e30f, total = 0.f, sum = 0.f;
    for (int c = 0; c < used; ++c) top = fmaxf(top, mine[c * (SIZE + 2) + SIZE]);
    for (int c = 0; c < used; ++c) {
        const float* part = mine + c * (SIZE + 2);
        const float weight = exp2f(part[SIZE] - top);
        total += weight * part[SIZE + 1];
        sum += weight * part[threadIdx.x];
    }
    out[(long long)blockIdx.x * SIZE + threadIdx.x] = to_half(sum / total);
}

// What other blocks of this kernel wrote: past the first cache, which is not theirs.
__device__ __forceinline__ float2 from_others(const float* at) {
    float2 out;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(out.x), "=f"(out.y) : "l"(at) : "memory");
    return out;
}

// A warp puts the chunks of one head together, eight at a time; each lane has pairs of elements, 64 apart.
__device__ __forceinline__ void join_head(const float* parts, int used, half_bits* out) {
    const int lane = threadIdx.x & 31;
    float top = -1e30f, total = 0.f;
    float2 sum[SIZE / 64] = {};
    for (int first = 0; first < used; first += 8) {
        float2 ends[8], got[8][SIZE / 64];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float* part = parts + (long long)(first + j) * (SIZE + 2);
            const bool there = first + j < used;
            ends[j] = there ? from_others(part + SIZE) : make_float2(-1e30f, 0.f);
#pragma unroll
            for (int e = 0; e < SIZE / 64; ++e) got[j][e] = there ? from_others(part + e * 64 + lane * 2) : make_float2(0.f, 0.f);
        }
        float more = top;
#pragma unroll
        for (int j = 0; j < 8; ++j) more = fmaxf(more, ends[j].x);
        const float shrink = exp2f(top - more);
        top = more;
        total *= shrink;
#pragma unroll
        for (int e = 0; e < SIZE / 64; ++e) sum[e].x *= shrink, sum[e].y *= shrink;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float weight = exp2f(ends[j].x - top);
            total += weight * ends[j].y;
#pragma unroll
            for (int e = 0; e < SIZE / 64; ++e) sum[e].x += weight * got[j][e].x, sum[e].y += weight * got[j][e].y;
        }
    }
#pragma unroll
    for (int e = 0; e < SIZE / 64; ++e) {
        out[e * 64 + lane * 2] = to_half(sum[e].x / total);
        out[e * 64 + lane * 2 + 1] = to_half(sum[e].y / total);
    }
}

// A query's share of a lane, rotated: elements eighth * OWN and on; the other half's are OWN * 4 away.
__device__ __forceinline__ void rotated(float (&query)[OWN], const half_bits* head, const float* norm, const float* cosines,
                                        const float* sines, float eps, float scale) {
    const int eighth = threadIdx.x & 7, other = eighth ^ 4;
    alignas(16) half_bits mine[OWN], theirs[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i += 8) {
        *reinterpret_cast<uint4*>(mine + i) = *reinterpret_cast<const uint4*>(head + eighth * OWN + i);
        *reinterpret_cast<uint4*>(theirs + i) = *reinterpret_cast<const uint4*>(head + other * OWN + i);
    }
    float factor = 1.f;
    if (norm) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < OWN; ++i) squares += to_float(mine[i]) * to_float(mine[i]);
#pragma unroll
        for (int d = 4; d; d >>= 1) squares += __shfl_xor_sync(0xffffffff, squares, d);
        factor = rsqrtf(squares / SIZE + eps);
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        float a = to_float(mine[i]), b = to_float(theirs[i]);
        if (norm) a *= factor * norm[eighth * OWN + i], b *= factor * norm[other * OWN + i];
        const float c = cosines[(eighth & 3) * OWN + i], s = sines[(eighth & 3) * OWN + i];
        const float turned = eighth < 4 ? a * c - b * s : a * c + b * s;
        query[i] = to_float(to_half(turned)) * scale;
    }
}

// `rotate`, `attend` and `join` in one: every block rotates its own queries; the one with the newest position rotates its key and
// puts key and value into the caches first; the block of a sequence's heads that ends last joins the chunks.
// arrived: int [B, q_heads / HEADS], zeros, and zeros again afterwards.
extern "C" __global__ void __launch_bounds__(128)
    attend_at_once(const half_bits* qkv, half_bits* keys, half_bits* values, const float* __restrict__ cosines,
                   const float* __restrict__ sines, const float* __restrict__ q_norm, const float* __restrict__ k_norm,
                   const int* position, float* partial, int* arrived, half_bits* __restrict__ out, int q_heads,
                   int kv_heads, int capacity, int chunks, int scale_bits, int eps_bits) {
    wait_for_earlier_kernels();
    const int chunk = blockIdx.x % chunks, group = blockIdx.x / chunks;
    const int first_head = group % (q_heads / HEADS) * HEADS, sequence = group / (q_heads / HEADS);
    const int newest = position[sequence], length = newest + 1, begin = chunk * CHUNK;
    const int end = min(length, begin + CHUNK), used = newest / CHUNK + 1;
    if (begin >= length) return;
    const int kv = first_head / (q_heads / kv_heads);
    const long long base = ((long long)sequence * kv_heads + kv) * capacity * SIZE;
    const half_bits* from = qkv + (long long)sequence * (q_heads + 2 * kv_heads) * SIZE;
    const float* c = cosines + (long long)newest * (SIZE / 2);
    const float* s = sines + (long long)newest * (SIZE / 2);
    const float eps = __int_as_float(eps_bits);

    if (end == length) {  // several blocks, of other heads, may write the same
        const int i = threadIdx.x;
        const half_bits* key = from + (q_heads + kv) * SIZE;
        float low = i < SIZE / 2 ? to_float(key[i]) : 0.f, high = i < SIZE / 2 ? to_float(key[i + SIZE / 2]) : 0.f;
        if (k_norm) {
            const float factor = rsqrtf(block_sum(low * low + high * high) / SIZE + eps);
            if (i < SIZE / 2) low *= factor * k_norm[i], high *= factor * k_norm[i + SIZE / 2];
        }
        if (i < SIZE / 2) {
            half_bits* to = keys + base + (long long)newest * SIZE;
            to[i] = to_half(low * c[i] - high * s[i]);
            to[i + SIZE / 2] = to_half(high * c[i] + low * s[i]);
            half_bits* value = values + base + (long long)newest * SIZE;
            value[i] = from[(q_heads + kv_heads + kv) * SIZE + i];
            value[i + SIZE / 2] = from[(q_heads + kv_heads + kv) * SIZE + i + SIZE / 2];
        }
        __syncthreads();
    }

    float query[HEADS][OWN];
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
        rotated(query[h], from + (first_head + h) * SIZE, q_norm, c, s, eps, __int_as_float(scale_bits) * 1.44269504f);
    float* mine = partial + ((long long)sequence * q_heads + first_head) * chunks * (SIZE + 2);
    attend_chunk(query, keys + base, values + base, begin, end, mine, chunk, chunks);

    __shared__ int is_last;
    __threadfence();
    __syncthreads();
    if (!threadIdx.x) is_last = atomicAdd(arrived + group, 1) == used - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (!threadIdx.x) arrived[group] = 0;
    for (int h = threadIdx.x >> 5; h < HEADS; h += 4)
        join_head(mine + (long long)h * chunks * (SIZE + 2), used, out + ((long long)sequence * q_heads + first_head + h) * SIZE);
}
