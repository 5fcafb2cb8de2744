// A CUDA runtime whose kernels do nothing. Preloaded, it lets torch's CUDA build run all of its host
// code (allocator, streams, events, autograd's threads, device checks) on a machine without a GPU,
// and counts what is asked of the device.
//
// Environment: PRETENDED_GPUS (8), PRETENDED_GPU_NAME, PRETENDED_GPU_MIB, PRETENDED_GPU_CAPABILITY
// (as 90).
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define API __attribute__((visibility("default")))
#define OK(name, ...) API cudaError_t name(__VA_ARGS__) { return cudaSuccess; }

// What is counted; the names are in counters.py.
enum { KERNELS, COPIES, STREAM_WAITS, DEVICE_WAITS, EVENT_WAITS, NUM };
static long counts[NUM];
static __thread int is_capturing;  // into a graph: what is launched runs with it, not now
static void add(int what) {
  if (!is_capturing) __atomic_fetch_add(&counts[what], 1, __ATOMIC_RELAXED);
}
API void pretended_gpu_counts(long *out) { memcpy(out, counts, sizeof counts); }

static __thread int device;

static long setting(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value ? atol(value) : otherwise;
}
static int num_devices(void) { return setting("PRETENDED_GPUS", 8); }
static size_t total_bytes(void) { return (size_t)setting("PRETENDED_GPU_MIB", 80 << 10) << 20; }
static int capability(void) { return setting("PRETENDED_GPU_CAPABILITY", 90); }

// Memory: address space that nobody touches, so that 80 GiB cost nothing.
struct range { char *at; size_t size; int kind; int device; };
static struct range ranges[65536];
static int num_ranges;
static size_t used[64];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t get(void **p, size_t size, int kind) {
  size = size ? (size + 4095) & ~(size_t)4095 : 4096;
  if (kind == cudaMemoryTypeDevice && used[device] + size > total_bytes())
    return cudaErrorMemoryAllocation;
  void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                  -1, 0);
  if (at == MAP_FAILED || num_ranges == 65536) return cudaErrorMemoryAllocation;
  pthread_mutex_lock(&lock);
  ranges[num_ranges++] = (struct range){at, size, kind, device};
  if (kind == cudaMemoryTypeDevice) used[device] += size;
  pthread_mutex_unlock(&lock);
  *p = at;
  return cudaSuccess;
}
static struct range *find(const void *p) {
  for (int i = num_ranges - 1; i >= 0; i--)
    if ((char *)p >= ranges[i].at && (char *)p < ranges[i].at + ranges[i].size) return &ranges[i];
  return NULL;
}
static cudaError_t drop(void *p) {
  pthread_mutex_lock(&lock);
  struct range *r = find(p);
  if (r) {
    if (r->kind == cudaMemoryTypeDevice) used[r->device] -= r->size;
    munmap(r->at, r->size);
    *r = ranges[--num_ranges];
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
static struct range about(const void *p) {
  pthread_mutex_lock(&lock);
  struct range *r = find(p);
  struct range found = r ? *r : (struct range){NULL, 0, cudaMemoryTypeUnregistered, -2};
  pthread_mutex_unlock(&lock);
  return found;
}
API cudaError_t cudaMalloc(void **p, size_t n) { return get(p, n, cudaMemoryTypeDevice); }
API cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
API cudaError_t cudaFree(void *p) { return drop(p); }
API cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return drop(p); }
API cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { return get(p, n, cudaMemoryTypeHost); }
API cudaError_t cudaMallocHost(void **p, size_t n) { return get(p, n, cudaMemoryTypeHost); }
API cudaError_t cudaFreeHost(void *p) { return drop(p); }
OK(cudaHostRegister, void *p, size_t n, unsigned f)
OK(cudaHostUnregister, void *p)
API cudaError_t cudaMemGetInfo(size_t *f, size_t *t) {
  *t = total_bytes();
  *f = *t - used[device];
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  struct range r = about(p);
  memset(a, 0, sizeof *a);
  a->type = r.kind;
  a->device = r.device;
  a->devicePointer = r.kind == cudaMemoryTypeUnregistered ? NULL : (void *)p;
  a->hostPointer = r.kind == cudaMemoryTypeHost ? (void *)p : NULL;
  return cudaSuccess;
}

// Copies: small ones from and to the host are done, as what they carry may decide something.
#define SMALL ((size_t)64 << 10)
static void copy(void *d, const void *s, size_t n) {
  add(COPIES);
  int to = about(d).kind, from = about(s).kind;
  if ((to == cudaMemoryTypeDevice) != (from == cudaMemoryTypeDevice) && n <= SMALL) memcpy(d, s, n);
}
API cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) {
  copy(d, s, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k,
                                cudaStream_t st) {
  copy(d, s, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyPeerAsync(void *d, int dd, const void *s, int sd, size_t n,
                                    cudaStream_t st) {
  add(COPIES);
  return cudaSuccess;
}
OK(cudaMemset, void *p, int v, size_t n)
API cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s) {
  add(KERNELS);
  return cudaSuccess;
}
OK(cudaMemcpyToSymbol, const void *s, const void *src, size_t n, size_t o, enum cudaMemcpyKind k)
API cudaError_t cudaGetSymbolAddress(void **p, const void *s) {
  static char room[1 << 20];
  *p = room;
  return cudaSuccess;
}

// Devices.
API cudaError_t cudaGetDeviceCount(int *n) { *n = num_devices(); return cudaSuccess; }
API cudaError_t cudaGetDevice(int *d) { *d = device; return cudaSuccess; }
API cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= num_devices()) return cudaErrorInvalidDevice;
  device = d;
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  const char *name = getenv("PRETENDED_GPU_NAME");
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", name ? name : "NVIDIA H100 80GB HBM3");
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->totalGlobalMem = total_bytes();
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->multiProcessorCount = 132;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlockOptin = 232448;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = 1;
  p->asyncEngineCount = 3;
  p->textureAlignment = 512;
  p->maxBlocksPerMultiProcessor = 32;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  switch (a) {
    case cudaDevAttrMultiProcessorCount: *v = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrComputeCapabilityMajor: *v = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *v = capability() % 10; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *v = 65536; break;
    case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
    case cudaDevAttrUnifiedAddressing: *v = 1; break;
    default: *v = 0;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) {
  snprintf(s, n, "0000:%02x:00.0", d + 1);
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *c, int a, int b) { *c = 1; return cudaSuccess; }
OK(cudaDeviceEnablePeerAccess, int a, unsigned f)
API cudaError_t cudaDeviceGetStreamPriorityRange(int *l, int *g) {
  if (l) *l = 0;
  if (g) *g = -5;
  return cudaSuccess;
}
static cudaError_t wait_for(int what) {
  if (is_capturing) return cudaErrorStreamCaptureUnsupported;
  add(what);
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize(void) { return wait_for(DEVICE_WAITS); }
API cudaError_t cudaDriverGetVersion(int *v) { *v = 13020; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13020; return cudaSuccess; }
OK(cudaGetLastError, void)
OK(cudaPeekAtLastError, void)
OK(cudaProfilerStart, void)
OK(cudaProfilerStop, void)
OK(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *m)

// Streams and events: whatever is asked for has already happened.
static uintptr_t next_stream = 0x1000;
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) {
  *s = (cudaStream_t)__atomic_fetch_add(&next_stream, 16, __ATOMIC_RELAXED);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) {
  return cudaStreamCreateWithPriority(s, f, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
OK(cudaStreamDestroy, cudaStream_t s)
API cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait_for(STREAM_WAITS); }
OK(cudaStreamQuery, cudaStream_t s)
OK(cudaStreamWaitEvent, cudaStream_t s, cudaEvent_t e, unsigned f)
static enum cudaStreamCaptureStatus capture_status(void) {
  return is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) {
  *c = capture_status();
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c,
                                         unsigned long long *id, cudaGraph_t *g,
                                         const cudaGraphNode_t **d, const cudaGraphEdgeData **e,
                                         size_t *n) {
  *c = capture_status();
  if (id) *id = is_capturing;
  if (n) *n = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *u,
                                      unsigned flags) {
  f(s, cudaSuccess, u);
  return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *u) {
  f(u);
  return cudaSuccess;
}
static double now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) {
  *e = calloc(1, sizeof(double));
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  *(double *)e = now_ms();
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) {
  return cudaEventRecord(e, s);
}
OK(cudaEventQuery, cudaEvent_t e)
API cudaError_t cudaEventSynchronize(cudaEvent_t e) { return wait_for(EVENT_WAITS); }
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = *(double *)b - *(double *)a;
  return cudaSuccess;
}

// Graphs: one launch, whatever they hold.
static int num_captures;
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
  is_capturing = ++num_captures;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
  *g = (cudaGraph_t)(uintptr_t)is_capturing;
  is_capturing = 0;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long f) {
  *e = (cudaGraphExec_t)g;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g,
                                              unsigned long long f) {
  return cudaGraphInstantiate(e, g, f);
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n) {
  *n = 1;
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { add(KERNELS); return cudaSuccess; }
OK(cudaGraphDestroy, cudaGraph_t g)
OK(cudaGraphExecDestroy, cudaGraphExec_t e)

// Kernels.
#define LAUNCH(name, ...) \
  API cudaError_t name(__VA_ARGS__) { add(KERNELS); return cudaSuccess; }
LAUNCH(cudaLaunchKernel, const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s)
LAUNCH(__cudaLaunchKernel, cudaKernel_t f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s)
LAUNCH(cudaLaunchKernelExC, const cudaLaunchConfig_t *c, const void *f, void **a)
LAUNCH(cudaLaunchCooperativeKernel, const void *f, dim3 g, dim3 b, void **a, size_t m,
       cudaStream_t s)
API cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) {
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = capability();
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
OK(cudaFuncSetAttribute, const void *f, enum cudaFuncAttribute a, int v)
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b,
                                                              size_t m) {
  *n = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b,
                                                                       size_t m, unsigned flags) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, f, b, m);
}

// The driver, which torch asks for by name.
static int any(void) { return 0; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *f, int *active) {
  *f = 0;
  *active = d == device;
  return 0;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **p, unsigned v,
                                                 unsigned long long f,
                                                 enum cudaDriverEntryPointQueryResult *q) {
  *p = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)any : (void *)cuDevicePrimaryCtxGetState;
  if (q) *q = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
