// snnTorch's Leaky neuron, fused; equations in sltt_ext/functional/leaky.py.
//
// The order of operations is that of sltt_ext/kernels/torch_leaky.py, contraction off. Membrane potentials and
// what backward reads are in float32, SCALAR is the type of x and of spikes.
//
// Defined by the launcher, per variant:
//   KERNEL     name of the kernel           SCALAR   float, float16 or bfloat16
//   THREADS    threads of a block           WIDTH    neighbouring elements a thread handles at once
//   RESET      SUBTRACT, ZERO or NONE       SAME_STEP  1: the reset happens in the step of the spike
//   backward   SURROGATE  body of surrogate(): H'(u)    REDUCE  sum the gradients of beta or threshold

#define SUBTRACT 0
#define ZERO 1
#define NONE 2

// One number for all elements, one per element, or one per channel: number (i / inner) % count for element i.
struct Parameter {
    const float* numbers;
    long long inner, count;

    __device__ __forceinline__ Pack<float, WIDTH> of(long long pack) const {
        Pack<float, WIDTH> values;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k)
            values.at[k] = numbers[count == 1 ? 0 : (pack * WIDTH + k) / inner % count];
        return values;
    }
};

// The potential after firing; what was reset on entry (r) is not reset again.
__device__ __forceinline__ float reset_within_step(float h, float s, float r, float threshold) {
    return h + -(s - r) * (RESET == SUBTRACT ? threshold : h);
}

#if FORWARD

// One thread walks the T steps for WIDTH neighbouring elements. mem_seq and h_seq [T, N] and mem_last [N] may be null.
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const SCALAR* __restrict__ x_seq, const float* __restrict__ mem_first, const float* __restrict__ betas,
    const float* __restrict__ thresholds, SCALAR* __restrict__ s_seq, float* __restrict__ mem_seq,
    float* __restrict__ mem_last, float* __restrict__ h_seq, long long elements, long long time_steps,
    long long beta_inner, long long beta_count, long long threshold_inner, long long threshold_count) {
    const Parameter beta_of = {betas, beta_inner, beta_count};
    const Parameter threshold_of = {thresholds, threshold_inner, threshold_count};
    const long long packs = elements / WIDTH, stride = static_cast<long long>(gridDim.x) * THREADS;
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < packs; i += stride) {
        const Pack<float, WIDTH> beta = beta_of.of(i), threshold = threshold_of.of(i);
        Pack<float, WIDTH> mem = load<WIDTH>(mem_first, i), next = load<WIDTH>(x_seq, i), h, s, r;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) r.at[k] = mem.at[k] > threshold.at[k] ? 1.0f : 0.0f;
        for (long long t = 0; t < time_steps; ++t) {
            const Pack<float, WIDTH> x = next;
            if (t + 1 < time_steps) next = load<WIDTH>(x_seq, (t + 1) * packs + i);  // on its way while step t computes
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
                const float kept = RESET == ZERO ? (1 - r.at[k]) * mem.at[k] : mem.at[k];
                h.at[k] = kept * beta.at[k] + x.at[k];
                if (RESET == SUBTRACT) h.at[k] += -r.at[k] * threshold.at[k];
                s.at[k] = h.at[k] > threshold.at[k] ? 1.0f : 0.0f;
                mem.at[k] = SAME_STEP ? reset_within_step(h.at[k], s.at[k], r.at[k], threshold.at[k]) : h.at[k];
                r.at[k] = !SAME_STEP ? s.at[k] : mem.at[k] > threshold.at[k] ? 1.0f : 0.0f;
            }
            store<WIDTH>(s_seq, t * packs + i, s);
            if (mem_seq) store<WIDTH>(mem_seq, t * packs + i, mem);
            if (h_seq) store<WIDTH>(h_seq, t * packs + i, h);
        }
        if (mem_last) store<WIDTH>(mem_last, i, mem);
    }
}

#else

__device__ __forceinline__ float surrogate(float u, float c0, float c1, float c2) { SURROGATE }

// Gradients of the learned parameters, each per element [N] or per block, or null.
struct Sums {
    double *betas, *thresholds;
    bool beta_per_element, threshold_per_element;
    double beta = 0, threshold = 0;

    __device__ __forceinline__ void add(long long pack, const double* of_beta, const double* of_threshold) {
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) {
            if (beta_per_element) betas[pack * WIDTH + k] = of_beta[k];
            if (threshold_per_element) thresholds[pack * WIDTH + k] = of_threshold[k];
            beta += of_beta[k];
            threshold += of_threshold[k];
        }
    }

    // Of the whole block, by all of its threads.
    __device__ __forceinline__ void finish() {
        if (betas && !beta_per_element) {
            beta = block_sum<THREADS>(beta);
            if (threadIdx.x == 0) betas[blockIdx.x] = beta;
            __syncthreads();
        }
        if (thresholds && !threshold_per_element) {
            threshold = block_sum<THREADS>(threshold);
            if (threadIdx.x == 0) thresholds[blockIdx.x] = threshold;
        }
    }
};

#if THROUGH_TIME

// One thread walks from the last step to the first for WIDTH neighbouring elements; g is the gradient of mem. With
// SAME_STEP it walks forward before, and grad_x holds the potential that entered each step until its gradient does.
//
// grad_s [T, N], grad_mem (steps from grad_mem_from on) and mem_first (read for sums, SAME_STEP and ZERO) may be null.
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const SCALAR* __restrict__ grad_s_seq, const float* __restrict__ grad_mem_seq, const float* __restrict__ h_seq,
    const float* __restrict__ mem_first, const float* __restrict__ betas, const float* __restrict__ thresholds,
    float* __restrict__ grad_x_seq, float* __restrict__ grad_mem_first, double* __restrict__ beta_sums,
    double* __restrict__ threshold_sums, long long elements, long long time_steps, long long grad_mem_from,
    long long beta_per_element, long long threshold_per_element, long long beta_inner, long long beta_count,
    long long threshold_inner, long long threshold_count, double c0_, double c1_, double c2_) {
    const float c0 = static_cast<float>(c0_), c1 = static_cast<float>(c1_), c2 = static_cast<float>(c2_);
    const Parameter beta_of = {betas, beta_inner, beta_count};
    const Parameter threshold_of = {thresholds, threshold_inner, threshold_count};
    const long long packs = elements / WIDTH, stride = static_cast<long long>(gridDim.x) * THREADS;
    Sums sums = {beta_sums, threshold_sums, beta_per_element != 0, threshold_per_element != 0};
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < packs; i += stride) {
        const Pack<float, WIDTH> beta = beta_of.of(i), threshold = threshold_of.of(i);
        Pack<float, WIDTH> mem = {}, g = {}, carried = {};
        if (mem_first) mem = load<WIDTH>(mem_first, i);
        if (SAME_STEP) {
            carried = mem;
            for (long long t = 0; t < time_steps; ++t) {
                store<WIDTH>(grad_x_seq, t * packs + i, carried);
                const Pack<float, WIDTH> h = load<WIDTH>(h_seq, t * packs + i);
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) {
                    const float r = carried.at[k] > threshold.at[k] ? 1.0f : 0.0f;
                    const float s = h.at[k] > threshold.at[k] ? 1.0f : 0.0f;
                    carried.at[k] = reset_within_step(h.at[k], s, r, threshold.at[k]);
                }
            }
        }
        double of_beta[WIDTH] = {}, of_threshold[WIDTH] = {};
        Pack<float, WIDTH> h = load<WIDTH>(h_seq, (time_steps - 1) * packs + i);
        for (long long t = time_steps - 1; t >= 0; --t) {
            const Pack<float, WIDTH> before = t ? load<WIDTH>(h_seq, (t - 1) * packs + i) : mem;
            carried = SAME_STEP ? load<WIDTH>(grad_x_seq, t * packs + i) : before;
            Pack<float, WIDTH> grad_s = {}, grad_mem = {}, grad_x;
            if (grad_s_seq) grad_s = load<WIDTH>(grad_s_seq, t * packs + i);
            if (grad_mem_seq && t >= grad_mem_from)
                grad_mem = load<WIDTH>(grad_mem_seq, (t - grad_mem_from) * packs + i);
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
                const float slope = surrogate(h.at[k] - threshold.at[k], c0, c1, c2);
                const float r = carried.at[k] > threshold.at[k] ? 1.0f : 0.0f;
                const float s = h.at[k] > threshold.at[k] ? 1.0f : 0.0f;
                float by_mem = g.at[k] + grad_mem.at[k], by_threshold = 0;
                if (SAME_STEP) {
                    const float by_reset = by_mem * (s - r);
                    grad_s.at[k] -= by_mem * (RESET == SUBTRACT ? threshold.at[k] : h.at[k]);
                    if (RESET == SUBTRACT) by_threshold -= by_reset;
                    if (RESET == ZERO) by_mem -= by_reset;
                }
                by_threshold -= slope * grad_s.at[k];
                const float grad_h = fmaf(slope, grad_s.at[k], by_mem);
                if (RESET == SUBTRACT) by_threshold -= grad_h * r;
                of_beta[k] += (RESET == ZERO ? carried.at[k] * (1 - r) : carried.at[k]) * grad_h;
                of_threshold[k] += by_threshold;
                grad_x.at[k] = grad_h;
                g.at[k] = grad_h * beta.at[k];
                if (RESET == ZERO) g.at[k] *= 1 - r;
            }
            store<WIDTH>(grad_x_seq, t * packs + i, grad_x);
            h = before;
        }
        store<WIDTH>(grad_mem_first, i, g);
        if (REDUCE) sums.add(i, of_beta, of_threshold);
    }
    if (REDUCE) sums.finish();
}

#else

// Element-wise over T * N, each thread one step; or, if walk, one thread walks the T steps, as it has to where the
// potential that entered a step is not h of the step before, or where sums over time are kept per element.
//
// grad_s [T, N], grad_mem (steps from grad_mem_from on) and mem_first (only read for sums and SAME_STEP) may be null,
// so may be the sums of the learned parameters: per element [N], or per block.
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const SCALAR* __restrict__ grad_s_seq, const float* __restrict__ grad_mem_seq, const float* __restrict__ h_seq,
    const float* __restrict__ mem_first, const float* __restrict__ thresholds, float* __restrict__ grad_x_seq,
    double* __restrict__ beta_sums, double* __restrict__ threshold_sums, long long elements, long long time_steps,
    long long grad_mem_from, long long walk, long long beta_per_element, long long threshold_per_element,
    long long threshold_inner, long long threshold_count, double c0_, double c1_, double c2_) {
    const float c0 = static_cast<float>(c0_), c1 = static_cast<float>(c1_), c2 = static_cast<float>(c2_);
    const Parameter threshold_of = {thresholds, threshold_inner, threshold_count};
    const long long packs = elements / WIDTH, rows = walk ? 1 : time_steps;
    const long long stride = static_cast<long long>(gridDim.x) * THREADS;
    Sums sums = {beta_sums, threshold_sums, beta_per_element != 0, threshold_per_element != 0};
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < rows * packs; i += stride) {
        const long long first = walk ? 0 : i / packs, p = i - first * packs;
        const Pack<float, WIDTH> threshold = threshold_of.of(p);
        Pack<float, WIDTH> carried = {};
        if (mem_first) carried = first ? load<WIDTH>(h_seq, (first - 1) * packs + p) : load<WIDTH>(mem_first, p);
        double of_beta[WIDTH] = {}, of_threshold[WIDTH] = {};
        for (long long t = first; t < (walk ? time_steps : first + 1); ++t) {
            const Pack<float, WIDTH> h = load<WIDTH>(h_seq, t * packs + p);
            const bool has_grad_mem = grad_mem_seq && t >= grad_mem_from;
            Pack<float, WIDTH> grad_s = {}, grad_mem = {}, grad_x;
            if (grad_s_seq) grad_s = load<WIDTH>(grad_s_seq, t * packs + p);
            if (has_grad_mem) grad_mem = load<WIDTH>(grad_mem_seq, (t - grad_mem_from) * packs + p);
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
                const float slope = surrogate(h.at[k] - threshold.at[k], c0, c1, c2);
                const float r = carried.at[k] > threshold.at[k] ? 1.0f : 0.0f;
                const float s = h.at[k] > threshold.at[k] ? 1.0f : 0.0f;
                float by_mem = grad_mem.at[k], grad_threshold = 0;
                if (has_grad_mem && SAME_STEP) {
                    const float by_reset = by_mem * (s - r);
                    grad_s.at[k] -= by_mem * (RESET == SUBTRACT ? threshold.at[k] : h.at[k]);
                    if (RESET == SUBTRACT) grad_threshold -= by_reset;
                    if (RESET == ZERO) by_mem -= by_reset;
                }
                float grad_h = grad_s_seq || mem_first ? slope * grad_s.at[k] : 0.0f;
                grad_threshold -= grad_h;
                if (has_grad_mem) grad_h += by_mem;
                grad_x.at[k] = grad_h;
                if (REDUCE) {
                    if (RESET == SUBTRACT) grad_threshold -= grad_h * r;
                    of_beta[k] += (RESET == ZERO ? carried.at[k] * (1 - r) : carried.at[k]) * grad_h;
                    of_threshold[k] += grad_threshold;
                }
                carried.at[k] = SAME_STEP ? reset_within_step(h.at[k], s, r, threshold.at[k]) : h.at[k];
            }
            store<WIDTH>(grad_x_seq, t * packs + p, grad_x);
        }
        if (REDUCE) sums.add(p, of_beta, of_threshold);
    }
    if (REDUCE) sums.finish();
}

#endif
#endif
