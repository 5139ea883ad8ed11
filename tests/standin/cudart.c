/* The part of CUDA's runtime that CuPy's core calls, on the stand-in driver: with the signatures that Cython
 * gives CuPy's own functions of these names, which CuPy's modules look up in a table as they are imported.
 */
#include <stddef.h>
#include <stdint.h>

typedef void *Object;

int cuInit(unsigned);
int cuCtxGetDevice(int *);
int cuCtxSetCurrent(void *);
int cuDeviceGetAttribute(int *, int, int);
int cuDeviceGetCount(int *);
int cuDevicePrimaryCtxRetain(void **, int);
int cuDriverGetVersion(int *);
int cuMemAlloc_v2(void **, size_t);
int cuMemFree_v2(void *);
int cuPointerGetAttribute(void *, int, const char *);
int cuStreamCreateWithPriority(void **, unsigned, int);
int cuStreamDestroy_v2(void *);
int cuStreamSynchronize(void *);

Object (*cupy_check_status)(int status, int skip); /* raises CuPy's exception, or returns None */

static int failed(int status) { return status && !cupy_check_status(status, 0); }

static int initialised(void) { return cuInit(0); }

int cupy_getDeviceCount(int skip) {
  int count = 0, status = initialised();
  (void)skip;
  return failed(status ? status : cuDeviceGetCount(&count)) ? -1 : count;
}

int cupy_getDevice(int skip) { /* as in the runtime, the first until one is set */
  int device = 0;
  (void)skip;
  if (failed(initialised())) return -1;
  return cuCtxGetDevice(&device) ? 0 : device;
}

Object cupy_setDevice(int device, int skip) {
  void *context;
  int status = initialised();
  if (!status) status = cuDevicePrimaryCtxRetain(&context, device);
  if (!status) status = cuCtxSetCurrent(context);
  return cupy_check_status(status, skip);
}

Object cupy__ensure_context(void) { return cupy_setDevice(cupy_getDevice(0), 0); }

int cupy_driverGetVersion(int skip) {
  int version = 0;
  (void)skip;
  return failed(cuDriverGetVersion(&version)) ? -1 : version;
}

int cupy_deviceGetAttribute(int attribute, int device, int skip) {
  int value = 0;
  (void)skip;
  return failed(cuDeviceGetAttribute(&value, attribute, device)) ? -1 : value;
}

intptr_t cupy_malloc(size_t nbytes, int skip) {
  void *address = NULL, *made = cupy__ensure_context();
  (void)skip;
  return !made || failed(cuMemAlloc_v2(&address, nbytes)) ? 0 : (intptr_t)address;
}

Object cupy_free(intptr_t address, int skip) { return cupy_check_status(cuMemFree_v2((void *)address), skip); }

intptr_t cupy_streamCreateWithPriority(unsigned flags, int priority, int skip) {
  void *stream = NULL, *made = cupy__ensure_context();
  (void)skip;
  return !made || failed(cuStreamCreateWithPriority(&stream, flags, priority)) ? 0 : (intptr_t)stream;
}

Object cupy_streamDestroy(intptr_t stream, int skip) {
  return cupy_check_status(cuStreamDestroy_v2((void *)stream), skip);
}

Object cupy_streamSynchronize(intptr_t stream, int skip) {
  return cupy_check_status(cuStreamSynchronize((void *)stream), skip);
}

int cupy_pointerGetMemoryType(intptr_t address, int skip) {
  unsigned type = 0;
  (void)skip;
  return failed(cuPointerGetAttribute(&type, 2, (const char *)address)) ? -1 : (int)type;
}
