// A CUDA runtime without a GPU, for torch: device memory is host memory, a stream is a queue of work for the CPU.
//
//   work is queued on a stream ── it runs when something waits for it ── in each stream's own order
//
// Which stream runs first is as unkind as a GPU may be, now this way, now that: only what is waited for, so that who forgets to wait
// reads what was there before; or all other streams first, so that memory given away too early is overwritten before
// it is read. A stream that is captured into a graph follows CUDA's rules (CUDA C Programming Guide, "Creating a Graph Using Stream Capture"):
// what may not be called meanwhile fails, and so do waits across the capture's edge and branches that do not join.
//
// The work itself comes from operators.py, as numbers. Kernels of torch's own are not run: launching one is an error.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace {

using Work = std::function<void()>;
using Graph = std::vector<Work>;

struct Stream;

struct Capture {
    Graph *graph;
    unsigned long long id;
    cudaStreamCaptureMode mode;
    pthread_t thread;
    bool invalid = false;
    std::set<Stream *> branches;  // streams that joined by waiting for an event of the capture
};

struct Stream {
    int device = 0;
    std::deque<Work> queue;
    unsigned long queued = 0, done = 0;
    int priority = 0;
    Capture *capture = nullptr;
    unsigned long captured = 0, joined = 0;  // work of this branch, and how much of it another one has waited for
};

struct Event {
    Stream *stream = nullptr;
    unsigned long position = 0;  // in the stream's queue, or in the branch of a capture
    Capture *capture = nullptr;
    double milliseconds = 0;
};

enum Kind { device, pinned, pageable };

constexpr int device_count = 2;
constexpr size_t total_memory = 40ull << 30;

std::mutex state;               // guards all that follows; never held while work runs
std::recursive_mutex running;   // whose turn it is to run work
struct Allocation {
    size_t size;
    Kind kind;
    int device;
};

std::map<char *, Allocation> allocations;
size_t used_memory[device_count] = {};
Stream default_streams[device_count] = {{0}, {1}};
std::set<Stream *> streams{&default_streams[0], &default_streams[1]};
thread_local int current_device = 0;
std::set<Capture *> captures;
unsigned long long captures_begun = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;
void (*run_numbered)(long) = nullptr;

using Locked = std::lock_guard<std::mutex>;

cudaError_t fail(cudaError_t error) { return last_error = error; }

Stream *find(cudaStream_t stream) {
    bool own = stream && stream != cudaStreamLegacy && stream != cudaStreamPerThread;
    return own ? reinterpret_cast<Stream *>(stream) : &default_streams[current_device];
}

Event *find(cudaEvent_t event) { return reinterpret_cast<Event *>(event); }

double milliseconds_now() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

// The turn to run work. Work needs Python's lock: who waits for the turn must not hold it.
class Turn {
public:
    Turn() {
        static auto held = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
        static auto save = reinterpret_cast<void *(*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
        static auto alive = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "Py_IsInitialized"));
        if (alive && alive() && held()) python = save();
        running.lock();
    }
    ~Turn() {
        static auto restore = reinterpret_cast<void (*)(void *)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
        running.unlock();
        if (python) restore(python);
    }

private:
    void *python = nullptr;
};

// Run a stream's work up to a position. The caller has the turn.
void run(Stream *stream, unsigned long position) {
    for (;;) {
        Work work;
        {
            Locked locked(state);
            if (stream->done >= position || stream->queue.empty()) return;
            work = std::move(stream->queue.front());
            stream->queue.pop_front();
        }
        work();
        Locked locked(state);
        stream->done++;
    }
}

// Somebody waits for a stream's work up to a position: run that alone or, half the times, all else before it.
void run_for_host(Stream *stream, unsigned long position) {
    static std::minstd_rand coin;  // guarded by the turn; a strict alternation would fall in step with the batches
    Turn turn;
    if (coin() & 1024) {
        std::vector<std::pair<Stream *, unsigned long>> others;
        {
            Locked locked(state);
            for (Stream *one : streams)
                if (one != stream) others.push_back({one, one->queued});
        }
        for (auto &[one, end] : others) run(one, end);
    }
    run(stream, position);
}

void queue(Stream *stream, Work work) {
    Locked locked(state);
    if (stream->capture) {
        stream->capture->graph->push_back(std::move(work));
        stream->captured++;
    } else {
        stream->queue.push_back(std::move(work));
        stream->queued++;
    }
}

// Whether a call that may wait for the device is forbidden now: the rules of cudaThreadExchangeStreamCaptureMode.
bool forbidden() {
    Locked locked(state);
    bool found = false;
    for (Capture *capture : captures) {
        bool own = pthread_equal(capture->thread, pthread_self());
        bool meant = own ? capture->mode != cudaStreamCaptureModeRelaxed
                         : capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
        if (thread_mode != cudaStreamCaptureModeRelaxed && meant) found = capture->invalid = true;
    }
    return found;
}

cudaError_t wait_for(Stream *stream) {
    if (stream->capture) stream->capture->invalid = true;
    if (stream->capture || forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
    unsigned long position;
    {
        Locked locked(state);
        position = stream->queued;
    }
    run_for_host(stream, position);
    return cudaSuccess;
}

cudaError_t wait_for_all() {
    if (forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
    std::vector<std::pair<Stream *, unsigned long>> positions;
    {
        Locked locked(state);
        for (Stream *stream : streams)
            if (stream->device == current_device) positions.push_back({stream, stream->queued});
    }
    Turn turn;
    for (auto &[stream, position] : positions) run(stream, position);
    return cudaSuccess;
}

Allocation allocation_of(const void *pointer) {
    Locked locked(state);
    auto next = allocations.upper_bound(static_cast<char *>(const_cast<void *>(pointer)));
    if (next == allocations.begin()) return {0, pageable, 0};
    auto &[start, found] = *--next;
    return pointer < start + found.size ? found : Allocation{0, pageable, 0};
}

Kind kind_of(const void *pointer) { return allocation_of(pointer).kind; }

cudaError_t allocate(void **pointer, size_t size, Kind kind) {
    if (forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
    if (size == 0) size = 1;
    Locked locked(state);
    size_t &used = used_memory[current_device];
    if (kind == device && used + size > total_memory) return fail(cudaErrorMemoryAllocation);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    *pointer = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (*pointer == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    allocations[static_cast<char *>(*pointer)] = {size, kind, current_device};
    if (kind == device) used += size;
    return cudaSuccess;
}

cudaError_t release(void *pointer) {
    if (!pointer) return cudaSuccess;
    if (cudaError_t error = wait_for_all()) return error;
    Locked locked(state);
    auto found = allocations.find(static_cast<char *>(pointer));
    if (found == allocations.end()) return fail(cudaErrorInvalidValue);
    auto [size, kind, number] = found->second;
    if (kind == device) used_memory[number] -= size;
    allocations.erase(found);
    munmap(pointer, size);
    return cudaSuccess;
}

}  // namespace

extern "C" {

// ── what operators.py calls ─────────────────────────────────────────────────────────────────────────────────────────

void simulated_gpu_runs(void (*function)(long)) { run_numbered = function; }

void simulated_gpu_queue(cudaStream_t stream, long number) {
    queue(find(stream), [number] { run_numbered(number); });
}

int simulated_gpu_captures(cudaStream_t stream) { return find(stream)->capture != nullptr; }

// Whether a stretch of memory lies in one allocation that has not been freed.
int simulated_gpu_holds(const char *start, size_t size) {
    return kind_of(start) == device && kind_of(start + size - 1) == device;
}

int simulated_gpu_wait(cudaStream_t stream) { return wait_for(find(stream)); }

// ── the device ──────────────────────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaGetDeviceCount(int *count) {
    *count = device_count;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *number) {
    *number = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int number) {
    current_device = number;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

// Older than the Triton kernels ask for, so that their plain references run in their place; SIMULATED_GPU_MAJOR=9 lets
// Triton's interpreter run them, which takes its time.
static int capability_major() {
    const char *major = getenv("SIMULATED_GPU_MAJOR");
    return major ? atoi(major) : 7;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "Simulated GPU");
    properties->major = capability_major();
    properties->minor = capability_major() == 7 ? 5 : 0;
    properties->totalGlobalMem = total_memory;
    properties->multiProcessorCount = 132;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = 227 << 10;
    properties->regsPerMultiprocessor = 64 << 10;
    properties->l2CacheSize = 50 << 20;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability_major() : 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int) {
    snprintf(id, length, "0000:00:00.0");
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

// A device is no more waited for while one of its streams is captured than that stream is, whichever the thread and mode
// (CUDA C Programming Guide, "Prohibited and Unhandled Operations").
cudaError_t cudaDeviceSynchronize() {
    {
        Locked locked(state);
        bool captured = false;
        for (Stream *stream : streams)
            if (stream->device == current_device && stream->capture) captured = stream->capture->invalid = true;
        if (captured) return fail(cudaErrorStreamCaptureUnsupported);
    }
    return wait_for_all();
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }

cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

const char *cudaGetErrorName(cudaError_t) { return "the error above"; }

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorNoKernelImageForDevice: return "a kernel of torch's own was launched on the simulated GPU";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
        case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
        case cudaErrorStreamCaptureMerge: return "capturing streams of two captures were merged";
        case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
        default: return "unknown error";
    }
}

// ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaMemGetInfo(size_t *free_memory, size_t *total) {
    Locked locked(state);
    *total = total_memory;
    *free_memory = total_memory - used_memory[current_device];
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t size) { return allocate(pointer, size, device); }

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned) { return allocate(pointer, size, pinned); }

cudaError_t cudaFree(void *pointer) { return release(pointer); }

cudaError_t cudaFreeHost(void *pointer) { return release(pointer); }

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    const cudaMemoryType types[] = {cudaMemoryTypeDevice, cudaMemoryTypeHost, cudaMemoryTypeUnregistered};
    attributes->type = types[kind_of(pointer)];
    attributes->device = allocation_of(pointer).device;
    attributes->devicePointer = attributes->hostPointer = const_cast<void *>(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    queue(find(stream), [=] { memcpy(to, from, size); });
    return kind_of(to) == pageable || kind_of(from) == pageable ? wait_for(find(stream)) : cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind kind) {
    if (cudaError_t error = cudaMemcpyAsync(to, from, size, kind, nullptr)) return error;
    return wait_for(find(cudaStream_t{}));
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    queue(find(stream), [=] { memset(to, value, size); });
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, nullptr); }

// ── streams and events; neither is ever freed, as work may still name them ──────────────────────────────────────────

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int priority) {
    auto *made = new Stream;
    made->device = current_device;
    made->priority = priority;
    Locked locked(state);
    streams.insert(made);
    *stream = reinterpret_cast<cudaStream_t>(made);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = find(stream)->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for(find(stream)); }

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
    Locked locked(state);
    return find(stream)->done == find(stream)->queued ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = reinterpret_cast<cudaEvent_t>(new Event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned) {
    Event *event = find(handle);
    Stream *stream = find(on);
    if (!stream->capture) queue(stream, [event] { event->milliseconds = milliseconds_now(); });
    Locked locked(state);
    event->stream = stream;
    event->capture = stream->capture;
    event->position = stream->capture ? stream->captured : stream->queued;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    Event *event = find(handle);
    if (forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
    if (event->capture) return fail(cudaErrorCapturedEvent);
    Locked locked(state);
    return !event->stream || event->stream->done >= event->position ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    Event *event = find(handle);
    if (forbidden()) return fail(cudaErrorStreamCaptureUnsupported);
    if (event->capture) return fail(cudaErrorCapturedEvent);
    if (event->stream) run_for_host(event->stream, event->position);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = static_cast<float>(find(end)->milliseconds - find(start)->milliseconds);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t waiting, cudaEvent_t handle, unsigned) {
    Stream *stream = find(waiting);
    Event event = *find(handle);
    if (event.capture) {
        Locked locked(state);
        if (!stream->capture) {
            stream->capture = event.capture;
            stream->captured = stream->joined = 0;
            event.capture->branches.insert(stream);
        }
        if (stream->capture != event.capture) return fail(cudaErrorStreamCaptureMerge);
        if (event.stream != stream && event.position > event.stream->joined) event.stream->joined = event.position;
    } else if (event.stream && stream->capture) {
        stream->capture->invalid = true;
        return fail(cudaErrorStreamCaptureIsolation);
    } else if (event.stream && event.stream != stream) {
        queue(stream, [event] { run(event.stream, event.position); });
    }
    return cudaSuccess;
}

// ── graphs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t on, cudaStreamCaptureMode mode) {
    Stream *stream = find(on);
    if (stream == &default_streams[stream->device]) return fail(cudaErrorStreamCaptureUnsupported);
    Locked locked(state);
    stream->capture = new Capture{new Graph, ++captures_begun, mode, pthread_self()};
    stream->captured = stream->joined = 0;
    captures.insert(stream->capture);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t on, cudaGraph_t *graph) {
    Stream *stream = find(on);
    Locked locked(state);
    Capture *capture = std::exchange(stream->capture, nullptr);
    *graph = nullptr;
    if (!capture) return fail(cudaErrorInvalidValue);
    captures.erase(capture);
    bool joined = true;
    for (Stream *branch : capture->branches) {
        if (branch->joined < branch->captured) joined = false;
        branch->capture = nullptr;
    }
    if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    if (!joined) return fail(cudaErrorStreamCaptureUnjoined);
    *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    Capture *capture = find(stream)->capture;
    *status = !capture             ? cudaStreamCaptureStatusNone
              : capture->invalid ? cudaStreamCaptureStatusInvalidated
                                   : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *) {
    Capture *capture = find(stream)->capture;
    if (capture && id) *id = capture->id;
    if (capture && graph) *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) {
    *count = reinterpret_cast<Graph *>(graph)->size();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
    *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph *>(graph)));
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    auto *graph = reinterpret_cast<Graph *>(executable);
    queue(find(stream), [graph] {
        for (auto &work : *graph) work();
    });
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// ── torch's own kernels: known by name, and never run ───────────────────────────────────────────────────────────────

void **__cudaRegisterFatBinary(void *) {
    static void *binary;
    return &binary;
}

void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction() {}
void __cudaRegisterVar() {}
char __cudaInitModule(void **) { return 0; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void *) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return cudaSuccess; }

cudaError_t __cudaGetKernel(void **kernel, const void *) {
    *kernel = nullptr;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    memset(attributes, 0, sizeof *attributes);
    attributes->binaryVersion = 10 * capability_major();
    attributes->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) {
    return fail(cudaErrorNoKernelImageForDevice);
}

cudaError_t __cudaLaunchKernel(void *, dim3, dim3, void **, size_t, cudaStream_t) {
    return fail(cudaErrorNoKernelImageForDevice);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *, void **) {
    return fail(cudaErrorNoKernelImageForDevice);
}
}
