// The fused IF, LIF and parametric LIF neurons; equations in sltt_ext/functional/lif.py.
//
// The order of operations is that of sltt_ext/kernels/torch_lif.py, contraction off, so that float32 results
// equal the torch backend's. Arithmetic and state are in float32, whatever SCALAR is.
//
// Defined by the launcher, per variant:
//   KERNEL     name of the kernel           SCALAR   float, float16 or bfloat16: x, spikes, derivatives
//   THREADS    threads of a block           WIDTH    neighbouring elements a thread handles at once
//   SURROGATE  body of surrogate(): H'(u) times the scale dh/dx, which is 1 for the gradient through time
//   SOFT_RESET 1: subtract v_threshold, 0: set to v_reset
//   forward    CHARGE  how x and v make h    SAVE  what backward needs    SAVE_SLOPES  keep dh/ddecay
//   backward   REDUCE  sum the gradient of the decay

__device__ __forceinline__ float surrogate(float u, float c0, float c1, float c2) { SURROGATE }

#if FORWARD

#define INTEGRATE 0      // IF
#define TAU_INPUT 1      // LIF, decay_input
#define TAU 2            // LIF, not decay_input
#define DECAY_INPUT 3    // parametric LIF, decay_input
#define DECAY 4          // parametric LIF, not decay_input
#define FACTORED_TAU 5   // LIF, not decay_input, factored leak; tau is 1 - 1 / tau
#define FACTORED_DECAY 6 // the same of parametric LIF

#define NOTHING 0
#define DERIVATIVES 1    // and the last charged potential
#define POTENTIALS 2     // all charged potentials, for a gradient through time

// The charged potential h; slope is dh/ddecay.
__device__ __forceinline__ float charge(float x, float v, float tau, float decay, float v_rest, float& slope) {
    if (CHARGE == INTEGRATE) return v + x;
    if (CHARGE == FACTORED_TAU || CHARGE == FACTORED_DECAY) {
        slope = -v;
        return v * (CHARGE == FACTORED_TAU ? tau : 1.0f - decay) + x;
    }
    const float leak = v - v_rest;
    if (CHARGE == TAU_INPUT || CHARGE == DECAY_INPUT) {
        slope = x - leak;
        return CHARGE == TAU_INPUT ? v + slope / tau : v + slope * decay;
    }
    slope = -leak;
    return v - (CHARGE == TAU ? leak / tau : leak * decay) + x;
}

// The potential after the reset.
__device__ __forceinline__ float reset(float h, bool fires, float v_threshold, float v_reset) {
    if (SOFT_RESET) return h - v_threshold * (fires ? 1.0f : 0.0f);
    const float distance = (v_reset - h) * 0.0f;  // as torch.lerp: an infinite h gives NaN
    return fires ? v_reset - distance : h + distance;
}

// One thread walks the T steps for WIDTH neighbouring elements. derivatives [T-1, N], the rest [T, N] or [N];
// v_first may be null: then every neuron starts from v_start. With charged_in it is the charged potential of the
// step before, and may be overwritten by h_last. v_last and h_last may be null. With POTENTIALS h_last is [T, N].
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const SCALAR* __restrict__ x_seq, const float* v_first, const float* __restrict__ decay_at,
    SCALAR* __restrict__ s_seq, float* __restrict__ v_last, SCALAR* __restrict__ derivatives,
    float* h_last, SCALAR* __restrict__ slopes, long long elements, long long time_steps,
    long long charged_in, double v_start, double tau_, double v_threshold_, double v_reset_, double c0_, double c1_,
    double c2_) {
    const float tau = static_cast<float>(tau_), v_threshold = static_cast<float>(v_threshold_);
    const float v_reset = static_cast<float>(v_reset_), v_rest = SOFT_RESET ? 0.0f : v_reset;
    const float c0 = static_cast<float>(c0_), c1 = static_cast<float>(c1_), c2 = static_cast<float>(c2_);
    const bool learnable = CHARGE == DECAY_INPUT || CHARGE == DECAY || CHARGE == FACTORED_DECAY;
    const float decay = learnable ? *decay_at : 1.0f;
    const long long packs = elements / WIDTH, stride = static_cast<long long>(gridDim.x) * THREADS;
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < packs; i += stride) {
        Pack<float, WIDTH> v, next = load<WIDTH>(x_seq, i), h, s, local, slope;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) v.at[k] = static_cast<float>(v_start);
        if (v_first) v = load<WIDTH>(v_first, i);
        if (charged_in) {
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) v.at[k] = reset(v.at[k], v.at[k] >= v_threshold, v_threshold, v_reset);
        }
        for (long long t = 0; t < time_steps; ++t) {
            const Pack<float, WIDTH> x = next;
            const bool is_last = t + 1 == time_steps;
            if (!is_last) next = load<WIDTH>(x_seq, (t + 1) * packs + i);  // on its way while step t computes
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
                h.at[k] = charge(x.at[k], v.at[k], tau, decay, v_rest, slope.at[k]);
                const bool fires = h.at[k] >= v_threshold;
                s.at[k] = fires ? 1.0f : 0.0f;
                v.at[k] = reset(h.at[k], fires, v_threshold, v_reset);
                if (SAVE == DERIVATIVES && !is_last) {
                    local.at[k] = surrogate(h.at[k] - v_threshold, c0, c1, c2);
                    if (CHARGE == DECAY_INPUT) local.at[k] *= decay;
                }
            }
            store<WIDTH>(s_seq, t * packs + i, s);
            if (SAVE == DERIVATIVES && !is_last) store<WIDTH>(derivatives, t * packs + i, local);
            if (SAVE == POTENTIALS) store<WIDTH>(h_last, t * packs + i, h);
            if (SAVE_SLOPES) store<WIDTH>(slopes, t * packs + i, slope);
        }
        if (v_last) store<WIDTH>(v_last, i, v);
        if (SAVE != POTENTIALS && h_last) store<WIDTH>(h_last, i, h);
    }
}

#elif THROUGH_TIME

// One thread walks from the last step to the first for WIDTH neighbouring elements; g is the gradient of v.
// grad_s [T, N] and grad_v_last [N] may be null, and so may decay. partials [blocks]: sums of grad_h * slopes.
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const SCALAR* __restrict__ grad_s_seq, const float* __restrict__ grad_v_last, const float* __restrict__ h_seq,
    const SCALAR* __restrict__ slopes, const float* __restrict__ decay_at, SCALAR* __restrict__ grad_x_seq,
    float* __restrict__ grad_v_first, double* __restrict__ partials, long long elements, long long time_steps,
    long long detach_reset, long long decay_input, double scale_, double kept_, double v_threshold_, double v_reset_,
    double c0_, double c1_, double c2_) {
    const float v_threshold = static_cast<float>(v_threshold_), v_reset = static_cast<float>(v_reset_);
    const float c0 = static_cast<float>(c0_), c1 = static_cast<float>(c1_), c2 = static_cast<float>(c2_);
    const float by_x = decay_at && decay_input ? *decay_at : static_cast<float>(scale_);   // dh/dx
    const float by_v = decay_at ? 1.0f - *decay_at : static_cast<float>(kept_);           // dh/dv
    const long long packs = elements / WIDTH, stride = static_cast<long long>(gridDim.x) * THREADS;
    double sum = 0;
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < packs; i += stride) {
        Pack<float, WIDTH> g = {}, grad_x;
        if (grad_v_last) g = load<WIDTH>(grad_v_last, i);
        for (long long t = time_steps - 1; t >= 0; --t) {
            const Pack<float, WIDTH> h = load<WIDTH>(h_seq, t * packs + i);
            Pack<float, WIDTH> grad_s = {}, slope = {};
            if (grad_s_seq) grad_s = load<WIDTH>(grad_s_seq, t * packs + i);
            if (REDUCE) slope = load<WIDTH>(slopes, t * packs + i);
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
                const float local = surrogate(h.at[k] - v_threshold, c0, c1, c2);
                float by_spike = grad_s.at[k];
                if (!detach_reset) by_spike = fmaf(SOFT_RESET ? -v_threshold : -(h.at[k] - v_reset), g.at[k], by_spike);
                if (!SOFT_RESET) g.at[k] *= h.at[k] < v_threshold ? 1.0f : 0.0f;
                const float grad_h = fmaf(local, by_spike, g.at[k]);
                if (REDUCE) sum += grad_h * slope.at[k];
                g.at[k] = grad_h * by_v;
                grad_x.at[k] = grad_h * by_x;
            }
            store<WIDTH>(grad_x_seq, t * packs + i, grad_x);
        }
        store<WIDTH>(grad_v_first, i, g);
    }
    if (REDUCE) {
        sum = block_sum<THREADS>(sum);
        if (threadIdx.x == 0) partials[blockIdx.x] = sum;
    }
}

#else

// Element-wise over T * N: no step depends on another. grad_s [T, N] and grad_v [N] may be null, and decay is
// unless x is multiplied by it. partials [blocks]: sums of grad_x * slopes.
extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(
    const SCALAR* __restrict__ grad_s_seq, const float* __restrict__ grad_v,
    const SCALAR* __restrict__ derivatives, const float* __restrict__ h_last,
    const SCALAR* __restrict__ slopes, const float* __restrict__ decay_at, SCALAR* __restrict__ grad_x_seq,
    double* __restrict__ partials, long long elements, long long time_steps, long long detach_reset,
    long long charged_out, double scale_, double v_threshold_, double v_reset_, double c0_, double c1_,
    double c2_) {
    const float scale = static_cast<float>(scale_), v_threshold = static_cast<float>(v_threshold_);
    const float v_reset = static_cast<float>(v_reset_);
    const float c0 = static_cast<float>(c0_), c1 = static_cast<float>(c1_), c2 = static_cast<float>(c2_);
    const float decay = decay_at ? *decay_at : 1.0f;
    const bool by_reset = !detach_reset && !charged_out;
    const long long packs = elements / WIDTH, before_last = (time_steps - 1) * packs;
    const long long stride = static_cast<long long>(gridDim.x) * THREADS;
    double sum = 0;
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < time_steps * packs;
         i += stride) {
        Pack<float, WIDTH> grad = {};
        if (grad_s_seq) grad = load<WIDTH>(grad_s_seq, i);
        if (i < before_last) {
            if (grad_s_seq) {
                const Pack<float, WIDTH> local = load<WIDTH>(derivatives, i);
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) grad.at[k] *= local.at[k];
            }
        } else {
            const Pack<float, WIDTH> h = load<WIDTH>(h_last, i - before_last);
            Pack<float, WIDTH> grad_state = {};
            if (grad_v) grad_state = load<WIDTH>(grad_v, i - before_last);
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
                const float u = h.at[k] - v_threshold;
                const float local = surrogate(u, c0, c1, c2);
                if (grad_s_seq) grad.at[k] *= local;
                if (grad_v) {
                    const bool passes = charged_out || SOFT_RESET || h.at[k] < v_threshold;
                    float state = passes ? scale : 0.0f;  // scale * dv/dh; of the charged potential, scale
                    if (by_reset && SOFT_RESET) state -= v_threshold * local;
                    if (by_reset && !SOFT_RESET) state += (v_reset - h.at[k]) * local;
                    grad.at[k] += state * grad_state.at[k];
                }
                grad.at[k] *= decay;
            }
        }
        store<WIDTH>(grad_x_seq, i, grad);
        if (REDUCE) {
            const Pack<float, WIDTH> slope = load<WIDTH>(slopes, i);
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum += rounded<SCALAR>(grad.at[k]) * slope.at[k];
        }
    }
    if (REDUCE) {
        sum = block_sum<THREADS>(sum);
        if (threadIdx.x == 0) partials[blockIdx.x] = sum;
    }
}

#endif
