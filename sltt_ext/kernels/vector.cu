// What the kernels share: half-precision numbers and loads of up to 16 bytes.
//
// Nothing is included: NVRTC then needs no CUDA headers, whose absence is the failure users report most.

struct float16 {
    unsigned short bits;
};

struct bfloat16 {
    unsigned short bits;
};

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(float16 value) { return half_to_float(value.bits); }
__device__ __forceinline__ float to_float(bfloat16 value) {
    return __uint_as_float(static_cast<unsigned int>(value.bits) << 16);
}

// To the nearest number, ties to even.
__device__ __forceinline__ void round_to(float value, float& out) { out = value; }
__device__ __forceinline__ void round_to(float value, float16& out) { out.bits = float_to_half(value); }
__device__ __forceinline__ void round_to(float value, bfloat16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const unsigned int bits = __float_as_uint(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out.bits = is_nan ? 0x7fff : static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// Neighbouring elements that one thread loads or stores at once.
template <class Scalar, int width>
struct alignas(sizeof(Scalar) * width < 16 ? sizeof(Scalar) * width : 16) Pack {
    Scalar at[width];
};

template <int width, class Scalar>
__device__ __forceinline__ Pack<float, width> load(const Scalar* array, long long pack) {
    const Pack<Scalar, width> raw = reinterpret_cast<const Pack<Scalar, width>*>(array)[pack];
    Pack<float, width> values;
#pragma unroll
    for (int k = 0; k < width; ++k) values.at[k] = to_float(raw.at[k]);
    return values;
}

template <int width, class Scalar>
__device__ __forceinline__ void store(Scalar* array, long long pack, const Pack<float, width>& values) {
    Pack<Scalar, width> raw;
#pragma unroll
    for (int k = 0; k < width; ++k) round_to(values.at[k], raw.at[k]);
    reinterpret_cast<Pack<Scalar, width>*>(array)[pack] = raw;
}

template <class Scalar>
__device__ __forceinline__ float rounded(float value) {
    Scalar out;
    round_to(value, out);
    return to_float(out);
}

// The sum of `value` over the threads of a block, valid in thread 0; the order is always the same.
template <int threads>
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double sums[threads];
    sums[threadIdx.x] = value;
    __syncthreads();
    for (int stride = threads / 2; stride > 0; stride /= 2) {
        if (threadIdx.x < stride) sums[threadIdx.x] += sums[threadIdx.x + stride];
        __syncthreads();
    }
    return sums[0];
}
