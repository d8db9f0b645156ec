// The CUDA driver for kernels built for the host: what sltt_ext calls of it, with a record of the calls.
//
// A module's image is the path of a library built with host.h. A thread has a stack of contexts, and a kernel runs only
// where the context it was loaded into is the current one.

#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

#include <mutex>
#include <string>
#include <vector>

#if __has_include(<cuda.h>)
#include <cuda.h>  // NVIDIA's declarations, which the compiler holds against what follows
#else
#define cuCtxPushCurrent cuCtxPushCurrent_v2
#define cuCtxPopCurrent cuCtxPopCurrent_v2
typedef int CUresult, CUdevice;
typedef struct Context* CUcontext;
typedef struct Module* CUmodule;
typedef struct Function* CUfunction;
typedef struct Stream* CUstream;
#endif

namespace {

struct Loaded {
    CUcontext context;
    void* library;
};

struct Entry {
    CUcontext context;
    void (*launch)(unsigned int blocks, unsigned int threads, void** arguments);
};

std::mutex mutex;
std::string record, failing;
int failing_with, pausing;
thread_local std::vector<CUcontext> stack;

CUresult called(const std::string& function, const std::string& arguments) {
    usleep(pausing);
    std::lock_guard<std::mutex> lock(mutex);
    record += function + "(" + arguments + ")\n";
    return static_cast<CUresult>(function == failing ? failing_with : 0);
}

std::string text(const void* handle) { return std::to_string(reinterpret_cast<unsigned long long>(handle)); }

}  // namespace

extern "C" {

const char* calls() { return record.c_str(); }
void forget_calls() { record.clear(); }
void fail(const char* function, int status) { failing = function, failing_with = status; }
void pause_for(int microseconds) { pausing = microseconds; }
void set_current(unsigned long long context) { stack.assign(context ? 1 : 0, reinterpret_cast<CUcontext>(context)); }
unsigned long long current() { return stack.empty() ? 0 : reinterpret_cast<unsigned long long>(stack.back()); }

CUresult cuInit(unsigned int flags) { return called("cuInit", std::to_string(flags)); }

CUresult cuDriverGetVersion(int* version) {
    *version = 13020;
    return called("cuDriverGetVersion", "");
}

CUresult cuGetErrorName(CUresult status, const char** name) {
    *name = status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : nullptr;
    return static_cast<CUresult>(*name ? 0 : 1);
}

CUresult cuGetErrorString(CUresult status, const char** description) {
    *description = status == 700 ? "an illegal memory access was encountered" : nullptr;
    return static_cast<CUresult>(*description ? 0 : 1);
}

CUresult cuDeviceGet(CUdevice* device, int index) {
    *device = 40 + index;
    return called("cuDeviceGet", std::to_string(index));
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = reinterpret_cast<CUcontext>(1000ull + device);
    return called("cuDevicePrimaryCtxRetain", std::to_string(device));
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = stack.empty() ? nullptr : stack.back();
    return called("cuCtxGetCurrent", "");
}

CUresult cuCtxPushCurrent(CUcontext context) {
    stack.push_back(context);
    return called("cuCtxPushCurrent_v2", text(context));
}

CUresult cuCtxPopCurrent(CUcontext* context) {
    *context = stack.back();
    stack.pop_back();
    return called("cuCtxPopCurrent_v2", "");
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    Loaded* loaded = new Loaded{stack.empty() ? nullptr : stack.back(), nullptr};
    loaded->library = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL);
    *module = reinterpret_cast<CUmodule>(loaded);
    if (!loaded->context) return static_cast<CUresult>(201);
    if (!loaded->library) return static_cast<CUresult>(200);
    return called("cuModuleLoadData", text(loaded->context));
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    const Loaded* loaded = reinterpret_cast<Loaded*>(module);
    void* found = dlsym(loaded->library, (std::string("launch_") + name).c_str());
    if (!found) return static_cast<CUresult>(500);
    Entry* entry = new Entry{loaded->context, nullptr};
    memcpy(&entry->launch, &found, sizeof found);
    *function = reinterpret_cast<CUfunction>(entry);
    return called("cuModuleGetFunction", name);
}

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                        unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared,
                        CUstream stream, void** arguments, void** extra) {
    const Entry* entry = reinterpret_cast<Entry*>(function);
    if (stack.empty() || stack.back() != entry->context) return static_cast<CUresult>(201);
    if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || extra) return static_cast<CUresult>(1);
    const CUresult status = called("cuLaunchKernel", std::to_string(grid_x) + ", " + std::to_string(block_x) + ", " +
                                                         std::to_string(shared) + ", " + text(stream));
    if (!status) entry->launch(grid_x, block_x, arguments);
    return status;
}
}
