/* The part of CUDA 13's runtime that torch calls to use devices without running kernels of its own: memory, copies,
 * streams, events and captures, on the stand-in driver. Loaded before torch, so that it takes the runtime's place.
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int cuCtxGetDevice(int *);
int cuCtxSetCurrent(void *);
int cuDeviceGetCount(int *);
int cuDevicePrimaryCtxRetain(void **, int);
int cuEventCreate(void **, unsigned);
int cuEventDestroy_v2(void *);
int cuEventQuery(void *);
int cuEventRecord(void *, void *);
int cuGetProcAddress_v2(const char *, void **, int, unsigned long long, int *);
int cuInit(unsigned);
int cuMemAlloc_v2(void **, size_t);
int cuMemFree_v2(void *);
int cuMemGetInfo_v2(size_t *, size_t *);
int cuMemcpyAsync(void *, const void *, size_t, void *);
int cuPointerGetAttribute(void *, int, const void *);
int cuStreamCreateWithPriority(void **, unsigned, int);
int cuStreamIsCapturing(void *, int *);
int cuStreamSynchronize(void *);
int cuStreamWaitEvent(void *, void *, unsigned);
int cuThreadExchangeStreamCaptureMode(int *);
int standin_capture(void *);

typedef struct { /* as far as torch reads it */
  char name[256], ids[32];
  size_t memory, rest[8];
  int major, minor;
} Properties;
typedef struct {
  int type, device;
  void *address, *host;
} Attributes;

static __thread int last;
static char graph; /* stands for every graph */

static int said(int status) {
  if (status) last = status;
  return status;
}

int cudaSetDevice(int device) {
  void *context;
  int status = cuInit(0);
  if (!status) status = cuDevicePrimaryCtxRetain(&context, device);
  return said(status ? status : cuCtxSetCurrent(context));
}

int cudaGetDevice(int *device) { /* the first until one is set */
  *device = 0;
  cuCtxGetDevice(device);
  return said(cuInit(0));
}

/* What a thread calls first makes a device current. */
#define CURRENT \
  do { int on, status = cudaGetDevice(&on); if (!status) status = cudaSetDevice(on); if (status) return status; } while (0)

int cudaGetDeviceCount(int *count) {
  int status = cuInit(0);
  return said(status ? status : cuDeviceGetCount(count));
}

int cudaGetDeviceProperties(Properties *properties, int device) {
  snprintf(properties->name, sizeof properties->name, "Stand-in %d", device);
  properties->major = 9;
  return 0;
}

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0, *greatest = -5;
  return 0;
}

int cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  (void)device, (void)peer;
  *can = 0;
  return 0;
}

int cudaDeviceSynchronize(void) {
  CURRENT;
  return 0;
}

int cudaGetLastError(void) {
  int status = last;
  last = 0;
  return status;
}

int cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(int status) { return status == 2 ? "out of memory" : "an error"; }
const char *cudaGetErrorName(int status) { return status == 2 ? "cudaErrorMemoryAllocation" : "cudaErrorStandIn"; }

int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     int *found) {
  *found = cuGetProcAddress_v2(name, function, (int)version, flags, NULL) != 0;
  return 0;
}

/* Memory. */

int cudaMalloc(void **address, size_t nbytes) {
  CURRENT;
  return said(cuMemAlloc_v2(address, nbytes));
}

int cudaFree(void *address) {
  CURRENT;
  return address ? said(cuMemFree_v2(address)) : 0;
}

int cudaHostAlloc(void **address, size_t nbytes, unsigned flags) {
  (void)flags;
  *address = aligned_alloc(4096, (nbytes + 4095) / 4096 * 4096);
  return 0;
}

int cudaFreeHost(void *address) {
  free(address);
  return 0;
}

int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  CURRENT;
  return said(cuMemGetInfo_v2(free_bytes, total));
}

int cudaMemcpyAsync(void *target, const void *source, size_t nbytes, int kind, void *stream) {
  (void)kind;
  CURRENT;
  return said(cuMemcpyAsync(target, source, nbytes, stream));
}

int cudaPointerGetAttributes(Attributes *attributes, const void *address) {
  *attributes = (Attributes){0, 0, NULL, NULL};
  if (!cuPointerGetAttribute(&attributes->device, 9, address)) attributes->type = 2; /* DEVICE_ORDINAL: device memory */
  return 0;
}

/* Streams, events and captures. */

int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  CURRENT;
  return said(cuStreamCreateWithPriority(stream, flags, priority));
}

int cudaStreamSynchronize(void *stream) {
  CURRENT;
  return said(cuStreamSynchronize(stream));
}

int cudaStreamQuery(void *stream) {
  (void)stream;
  return 0;
}

int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) {
  CURRENT;
  return said(cuStreamWaitEvent(stream, event, flags));
}

int cudaStreamIsCapturing(void *stream, int *status) {
  CURRENT;
  return said(cuStreamIsCapturing(stream, status));
}

int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **captured, void *nodes,
                             void *edges, size_t *count) {
  (void)nodes, (void)edges;
  if (id) *id = 1;
  if (captured) *captured = &graph;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}

int cudaStreamBeginCapture(void *stream, int mode) {
  (void)mode;
  standin_capture(stream);
  return 0;
}

int cudaStreamEndCapture(void *stream, void **captured) {
  (void)stream;
  *captured = &graph;
  return said(standin_capture(NULL) ? 901 : 0); /* cudaErrorStreamCaptureInvalidated */
}

int cudaThreadExchangeStreamCaptureMode(int *mode) { return cuThreadExchangeStreamCaptureMode(mode); }

int cudaGraphGetNodes(void *captured, void **nodes, size_t *count) {
  if (nodes) *nodes = captured;
  *count = 1;
  return 0;
}

int cudaGraphInstantiateWithFlags(void **executable, void *captured, unsigned long long flags) {
  (void)flags;
  *executable = captured;
  return 0;
}

int cudaGraphDestroy(void *captured) {
  (void)captured;
  return 0;
}

int cudaGraphExecDestroy(void *executable) { return cudaGraphDestroy(executable); }

int cudaEventCreateWithFlags(void **event, unsigned flags) {
  CURRENT;
  return said(cuEventCreate(event, flags));
}

int cudaEventDestroy(void *event) { return said(cuEventDestroy_v2(event)); }

int cudaEventRecord(void *event, void *stream) {
  CURRENT;
  return said(cuEventRecord(event, stream));
}

int cudaEventQuery(void *event) { return said(cuEventQuery(event)); }
