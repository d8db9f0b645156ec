// CUDA's words for a C++ compiler: the kernels run on the host, one block after the other.
//
// The threads of a block run one after the other too, unless the kernel synchronises them.

#include <math.h>
#include <pthread.h>
#include <string.h>

#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct Index {
    unsigned int x;
};

static thread_local Index threadIdx, blockIdx, gridDim;
static pthread_barrier_t all_threads;

static inline void __syncthreads() { pthread_barrier_wait(&all_threads); }

static inline float __uint_as_float(unsigned int bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline unsigned int __float_as_uint(float value) {
    unsigned int bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float half_to_float(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline unsigned short float_to_half(float number) {
    const _Float16 value = number;
    unsigned short bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <class... Parameters, std::size_t... i>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<i...>) {
    kernel(*static_cast<Parameters*>(arguments[i])...);
}

template <class... Parameters>
struct Thread {
    void (*kernel)(Parameters...);
    void** arguments;
    unsigned int blocks, number;

    void run(unsigned int block) const {
        gridDim.x = blocks, blockIdx.x = block, threadIdx.x = number;
        call(kernel, arguments, std::index_sequence_for<Parameters...>());
    }

    static void* run_all(void* self) {
        const Thread& thread = *static_cast<Thread*>(self);
        for (unsigned int block = 0; block < thread.blocks; ++block) {
            thread.run(block);
            __syncthreads();
        }
        return nullptr;
    }
};

template <class... Parameters>
void launch(void (*kernel)(Parameters...), unsigned int blocks, unsigned int threads, bool synchronises, void** arguments) {
    std::vector<Thread<Parameters...>> all;
    for (unsigned int k = 0; k < threads; ++k) all.push_back({kernel, arguments, blocks, k});
    if (!synchronises) {
        for (unsigned int block = 0; block < blocks; ++block)
            for (const auto& thread : all) thread.run(block);
        return;
    }
    pthread_barrier_init(&all_threads, nullptr, threads);
    std::vector<pthread_t> running(threads);
    for (unsigned int k = 0; k < threads; ++k)
        pthread_create(&running[k], nullptr, Thread<Parameters...>::run_all, &all[k]);
    for (pthread_t thread : running) pthread_join(thread, nullptr);
    pthread_barrier_destroy(&all_threads);
}
