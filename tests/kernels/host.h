// CUDA's words for a C++ compiler: kernels run on the host, in one thread.

#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <mutex>
#include <type_traits>
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

static Index threadIdx, blockIdx, gridDim;
static void (*body)();
static void** passed;
static std::mutex one_at_a_time;

// Switching by longjmp: swapcontext makes two system calls each time.
struct Thread {
    ucontext_t entry;
    jmp_buf here, scheduler;
    std::vector<char> stack = std::vector<char>(32768);
    bool started, finished;

    static Thread* running;

    void start() {
        started = finished = false;
        getcontext(&entry);
        entry.uc_stack.ss_sp = stack.data();
        entry.uc_stack.ss_size = stack.size();
        makecontext(&entry, run, 0);
    }

    bool resume() {
        if (finished) return false;
        running = this;
        if (!_setjmp(scheduler)) {
            if (started) _longjmp(here, 1);
            started = true;
            setcontext(&entry);
        }
        return !finished;
    }

    static void run() {
        body();
        running->finished = true;
        _longjmp(running->scheduler, 1);
    }
};

Thread* Thread::running;

static inline void __syncthreads() {
    Thread* self = Thread::running;
    if (!_setjmp(self->here)) _longjmp(self->scheduler, 1);
}

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

template <auto kernel, class... Parameters, std::size_t... i>
void call(void (*)(Parameters...), std::index_sequence<i...>) {
    kernel(*static_cast<Parameters*>(passed[i])...);
}

template <auto kernel, class... Parameters>
std::index_sequence_for<Parameters...> numbers_of(void (*)(Parameters...)) {
    return {};
}

// What each parameter is, by struct's letters: numbers, or integers and addresses, of 64 bits both.
template <class... Parameters>
const char* kinds_of(void (*)(Parameters...)) {
    static_assert(((sizeof(Parameters) == 8) && ...));
    static const char kinds[] = {(std::is_floating_point<Parameters>::value ? 'd' : 'q')..., 0};
    return kinds;
}

// One launch at a time, since what a kernel reads of its place is global here, and one block at a time. Its threads run one after the other, each from one __syncthreads() to the next if it has any.
template <auto kernel>
void launch(unsigned int blocks, unsigned int threads, bool synchronises, void** arguments) {
    std::lock_guard<std::mutex> lock(one_at_a_time);
    passed = arguments;
    body = [] { call<kernel>(kernel, decltype(numbers_of<kernel>(kernel))()); };
    gridDim.x = blocks;
    std::vector<Thread> all(synchronises ? threads : 0);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        if (!synchronises) {
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) body();
            continue;
        }
        for (Thread& thread : all) thread.start();
        for (unsigned int unfinished = threads; unfinished;) {
            unfinished = 0;
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) unfinished += all[threadIdx.x].resume();
        }
    }
}
