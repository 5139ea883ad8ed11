/* The smallest CUDA driver that the host path runs on: devices whose memory is the host's, and streams
 * that do at once what they are given. Each call is written to a log, and refused where a driver would
 * refuse it: without a context, with a handle that is not alive, for an empty grid. Kernels are run by
 * a callback.
 *
 * STANDIN_LOG      where the calls are written, one a line
 * STANDIN_INIT     what cuInit returns (0)
 * STANDIN_SIGNAL   what cuInit raises before that (none)
 * STANDIN_VERSION  of the driver (13000)
 * STANDIN_DEVICES  how many there are (2)
 * STANDIN_MEMORY   bytes of each (1 GiB)
 * STANDIN_CAPABILITY  of each, times ten (90)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900, CAPTURE_ISOLATION = 905,
  CAPTURE_IMPLICIT = 906
};
enum { RELAXED = 2, NON_BLOCKING = 1 };
enum { DEVICES = 8, OBJECTS = 1 << 16, DEPTH = 64, ALIGNMENT = 512 };

typedef struct { int device; } Context;
typedef struct {
  const char *address;
  size_t size; /* of memory; else 1 */
  char kind;
  int device;
  void *recorded; /* the stream of an event */
  unsigned flags; /* of a stream */
} Object;
typedef int (*Run)(const char *kernel, unsigned grid, unsigned block, void **parameters);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Object objects[OBJECTS];
static size_t used[DEVICES];
static Context primary[DEVICES] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};
static __thread Context *stack[DEPTH];
static __thread int depth;
static pid_t initialised;
static void *captured; /* a stream that work is captured from, in the mode that forbids the most */
static int spoiled;
static __thread int mode; /* of capture */
static Run run;

static long setting(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value ? atol(value) : otherwise;
}

#define LOG(...) record(__func__, __VA_ARGS__)
#define TRY(condition, error) do { if (!(condition)) return error; } while (0)
#define CONTEXT TRY(depth && stack[depth - 1], INVALID_CONTEXT)
/* What may wait for a device, or move its memory: while work is captured, it spoils the graph. */
#define UNSAFE TRY(!captured || mode == RELAXED, spoil(CAPTURE_UNSUPPORTED))
/* Work of a stream: of the legacy one it spoils the graph that is captured on a stream it synchronises with. */
#define WORK(stream) TRY(is_stream(stream), INVALID_HANDLE); TRY(!is_closed(stream), spoil(CAPTURE_IMPLICIT))

__attribute__((format(printf, 2, 3))) static void record(const char *function, const char *format, ...) {
  const char *path = getenv("STANDIN_LOG");
  if (!path) return;
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  int length = snprintf(line, sizeof line, "%s ", function);
  length += vsnprintf(line + length, sizeof line - length - 1, format, arguments);
  va_end(arguments);
  line[length++] = '\n';
  int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
  if (write(file, line, length) != length) abort();
  close(file);
}

static int spoil(int error) {
  spoiled = 1;
  return error;
}

static int device(void) { return stack[depth - 1]->device; }

/* Objects that are alive: 'm'emory, 's'treams, 'e'vents, 'p'ools, modu'l'es and 'k'ernels. */

static int add(const void *address, size_t size, char kind, int on) {
  pthread_mutex_lock(&lock);
  int k = 0;
  while (k < OBJECTS && objects[k].address) k++;
  if (k < OBJECTS) objects[k] = (Object){address, size, kind, on, NULL, 0};
  pthread_mutex_unlock(&lock);
  return k < OBJECTS ? SUCCESS : OUT_OF_MEMORY;
}

static Object find(const void *inside, char kind) {
  Object found = {0};
  pthread_mutex_lock(&lock);
  for (int k = 0; k < OBJECTS; k++)
    if (objects[k].kind == kind && (uintptr_t)inside - (uintptr_t)objects[k].address < objects[k].size)
      found = objects[k];
  pthread_mutex_unlock(&lock);
  return found;
}

static int discard(const void *address, char kind) {
  Object object = find(address, kind);
  TRY(object.address && object.address == address, kind == 'm' ? INVALID_VALUE : INVALID_HANDLE);
  pthread_mutex_lock(&lock);
  for (int k = 0; k < OBJECTS; k++)
    if (objects[k].address == address && objects[k].kind == kind) objects[k] = (Object){0};
  if (kind == 'm') used[object.device] -= object.size;
  pthread_mutex_unlock(&lock);
  free((void *)address);
  return SUCCESS;
}

static int new(void **handle, char kind) {
  CONTEXT;
  *handle = calloc(1, 1);
  return add(*handle, 1, kind, device());
}

static int is_stream(void *stream) { /* of the current context, or a default one */
  return (uintptr_t)stream <= 2 || (find(stream, 's').address && find(stream, 's').device == device());
}

static int is_closed(void *stream) { /* the legacy one, by the capture of a stream that it synchronises with */
  return captured && (uintptr_t)stream <= 1 && !(find(captured, 's').flags & NON_BLOCKING);
}

/* What the tests ask and set. */

void standin_run_with(Run callback) { run = callback; }
int standin_capture(void *stream) { /* of NULL: ends it, and returns whether the graph was spoiled */
  int was = spoiled;
  captured = stream, spoiled = 0;
  return was;
}
size_t standin_used(int index) { return used[index]; }

int standin_alive(char kind, uint64_t *addresses, uint64_t *sizes, int room) {
  int count = 0;
  pthread_mutex_lock(&lock);
  for (int k = 0; k < OBJECTS; k++)
    if (objects[k].kind == kind && count < room) {
      addresses[count] = (uintptr_t)objects[k].address;
      sizes[count++] = objects[k].size;
    }
  pthread_mutex_unlock(&lock);
  return count;
}

/* The driver. */

int cuInit(unsigned flags) {
  LOG("flags=%u", flags);
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  raise(setting("STANDIN_SIGNAL", 0));
  if (initialised && initialised != getpid()) return NOT_INITIALIZED;
  if (!setting("STANDIN_DEVICES", 2)) return NO_DEVICE;
  if (visible && (!*visible || !strncmp(visible, "MIG-", 4))) return NO_DEVICE; /* there is no such instance */
  int status = setting("STANDIN_INIT", SUCCESS);
  if (!status) initialised = getpid();
  return status;
}

int cuDriverGetVersion(int *version) {
  LOG(" ");
  *version = setting("STANDIN_VERSION", 13000);
  return SUCCESS;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  static const char *const suffixes[] = {"", "_v2", "_v3"};
  char symbol[128];
  (void)version, (void)flags;
  *function = NULL;
  for (int k = 0; k < 3 && !*function; k++) {
    snprintf(symbol, sizeof symbol, "%s%s", name, suffixes[k]);
    *function = dlsym(RTLD_DEFAULT, symbol);
    Dl_info found, own;
    if (*function && (!dladdr(*function, &found) || !dladdr(cuInit, &own) || found.dli_fbase != own.dli_fbase))
      *function = NULL;
  }
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}

int cuGetExportTable(const void **table, const void *id) { /* NVRTC asks for what no document names */
  (void)id;
  *table = NULL;
  return NOT_FOUND;
}

int cuGetErrorName(int status, const char **name) {
  *name = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_STANDIN";
  return SUCCESS;
}

int cuGetErrorString(int status, const char **text) {
  static __thread char described[32];
  snprintf(described, sizeof described, "error %d", status);
  *text = described;
  return SUCCESS;
}

int cuDeviceGetCount(int *count) {
  LOG(" ");
  TRY(initialised == getpid(), NOT_INITIALIZED);
  *count = setting("STANDIN_DEVICES", 2);
  return SUCCESS;
}

int cuDeviceGet(int *handle, int ordinal) {
  LOG("ordinal=%d", ordinal);
  TRY(initialised == getpid(), NOT_INITIALIZED);
  TRY(ordinal >= 0 && ordinal < setting("STANDIN_DEVICES", 2), INVALID_DEVICE);
  *handle = ordinal;
  return SUCCESS;
}

int cuDeviceGetName(char *name, int length, int on) {
  snprintf(name, length, "Stand-in %d", on);
  return SUCCESS;
}

int cuDeviceGetUuid_v2(void *uuid, int on) {
  memset(uuid, on, 16);
  return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *nbytes, int on) {
  (void)on;
  *nbytes = setting("STANDIN_MEMORY", 1 << 30);
  return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int on) {
  (void)on;
  switch (attribute) {
    case 75: *value = setting("STANDIN_CAPABILITY", 90) / 10; break; /* COMPUTE_CAPABILITY_MAJOR */
    case 76: *value = setting("STANDIN_CAPABILITY", 90) % 10; break; /* COMPUTE_CAPABILITY_MINOR */
    case 10: *value = 32; break;  /* WARP_SIZE */
    case 1: case 2: case 3: *value = 1024; break;
    default: *value = attribute == 115; /* MEMORY_POOLS_SUPPORTED */
  }
  return SUCCESS;
}

int cuDevicePrimaryCtxRetain(Context **context, int on) {
  LOG("device=%d", on);
  *context = &primary[on];
  return setting("STANDIN_RETAIN", SUCCESS);
}

int cuDevicePrimaryCtxRelease_v2(int on) {
  LOG("device=%d", on);
  return SUCCESS;
}

int cuDevicePrimaryCtxGetState(int on, unsigned *flags, int *active) { /* torch's */
  (void)on;
  *flags = 0, *active = 1;
  return SUCCESS;
}

int cuCtxGetCurrent(Context **context) {
  *context = depth ? stack[depth - 1] : NULL;
  return SUCCESS;
}

int cuCtxSetCurrent(Context *context) {
  LOG("device=%d", context ? context->device : -1);
  if (!depth) depth = 1;
  stack[depth - 1] = context;
  if (!context) depth--;
  return SUCCESS;
}

int cuCtxPushCurrent_v2(Context *context) {
  LOG("device=%d", context->device);
  TRY(depth < DEPTH, INVALID_CONTEXT);
  stack[depth++] = context;
  return SUCCESS;
}

int cuCtxPopCurrent_v2(Context **context) {
  LOG(" ");
  CONTEXT;
  *context = stack[--depth];
  return SUCCESS;
}

int cuCtxGetDevice(int *on) {
  CONTEXT;
  *on = device();
  return SUCCESS;
}

int cuCtxSynchronize(void) {
  LOG(" ");
  CONTEXT;
  return SUCCESS;
}

/* Memory. */

int cuMemPoolCreate(void **pool, const int *properties) {
  int on = properties[3]; /* after the types of allocation, handle and location */
  LOG("device=%d", on);
  UNSAFE;
  *pool = calloc(1, 1);
  return add(*pool, 1, 'p', on);
}

int cuMemPoolDestroy(void *pool) {
  LOG("pool=%p", pool);
  return discard(pool, 'p');
}

int cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
  LOG("pool=%p attribute=%d value=%llu", pool, attribute, *(unsigned long long *)value);
  return find(pool, 'p').address ? SUCCESS : INVALID_HANDLE;
}

int cuMemPoolSetAccess(void *pool, const void *access, size_t count) {
  LOG("pool=%p", pool);
  (void)access, (void)count;
  return SUCCESS;
}

int cuMemPoolTrimTo(void *pool, size_t keep) {
  LOG("pool=%p keep=%zu", pool, keep);
  return SUCCESS;
}

int cuDeviceGetDefaultMemPool(void **pool, int on) {
  LOG("device=%d", on);
  *pool = NULL;
  return SUCCESS;
}

static int allocate(char **address, size_t nbytes, int on) {
  size_t size = (nbytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  pthread_mutex_lock(&lock);
  int fits = used[on] + size <= (size_t)setting("STANDIN_MEMORY", 1 << 30);
  if (fits) used[on] += size;
  pthread_mutex_unlock(&lock);
  TRY(fits, OUT_OF_MEMORY);
  *address = aligned_alloc(ALIGNMENT, size);
  memset(*address, 0x55, size);
  return add(*address, size, 'm', on);
}

int cuMemAllocFromPoolAsync(char **address, size_t nbytes, void *pool, void *stream) {
  LOG("nbytes=%zu stream=%p", nbytes, stream);
  CONTEXT;
  Object owner = find(pool, 'p');
  TRY(owner.address, INVALID_HANDLE);
  WORK(stream);
  TRY(nbytes, INVALID_VALUE);
  return allocate(address, nbytes, owner.device);
}

int cuMemFreeAsync(char *address, void *stream) {
  LOG("stream=%p", stream);
  TRY(!captured || stream != captured, spoil(INVALID_VALUE)); /* it is no memory of the graph's */
  TRY(!is_closed(stream), spoil(CAPTURE_IMPLICIT));
  return discard(address, 'm');
}

int cuMemAlloc_v2(char **address, size_t nbytes) { /* CuPy's */
  LOG("nbytes=%zu", nbytes);
  CONTEXT;
  UNSAFE;
  TRY(nbytes, INVALID_VALUE);
  return allocate(address, nbytes, device());
}

int cuMemFree_v2(char *address) {
  LOG("address=%p", address);
  UNSAFE;
  return discard(address, 'm');
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  CONTEXT;
  *total = setting("STANDIN_MEMORY", 1 << 30);
  *free_bytes = *total - used[device()];
  return SUCCESS;
}

int cuMemcpyAsync(char *target, const char *source, size_t nbytes, void *stream) {
  LOG("nbytes=%zu stream=%p", nbytes, stream);
  CONTEXT;
  WORK(stream);
  memcpy(target, source, nbytes);
  return SUCCESS;
}

int cuPointerGetAttribute(void *value, int attribute, const char *address) {
  Object memory = find(address, 'm');
  TRY(memory.address, INVALID_VALUE);
  switch (attribute) {
    case 2: *(unsigned *)value = 2; break;           /* MEMORY_TYPE: device */
    case 8: *(unsigned *)value = 0; break;           /* IS_MANAGED */
    case 9: *(int *)value = memory.device; break;    /* DEVICE_ORDINAL */
    default: return INVALID_VALUE;
  }
  return SUCCESS;
}

int cuPointerGetAttributes(unsigned count, const int *attributes, void **values, const char *address) {
  Object memory = find(address, 'm'); /* of unknown memory all are 0 */
  for (unsigned k = 0; k < count; k++) {
    *(int *)values[k] = 0;
    if (memory.address) cuPointerGetAttribute(values[k], attributes[k], address);
  }
  return SUCCESS;
}

/* Streams and events. */

int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  int status = new(stream, 's');
  LOG("stream=%p flags=%u priority=%d", *stream, flags, priority);
  pthread_mutex_lock(&lock);
  for (int k = 0; k < OBJECTS; k++)
    if (objects[k].address == *stream) objects[k].flags = flags;
  pthread_mutex_unlock(&lock);
  return status;
}

int cuStreamDestroy_v2(void *stream) {
  LOG("stream=%p", stream);
  return discard(stream, 's');
}

int cuStreamSynchronize(void *stream) {
  LOG("stream=%p", stream);
  CONTEXT;
  UNSAFE;
  WORK(stream);
  return SUCCESS;
}

int cuThreadExchangeStreamCaptureMode(int *other) {
  int was = mode;
  mode = *other, *other = was;
  return SUCCESS;
}

int cuStreamIsCapturing(void *stream, int *status) {
  CONTEXT;
  TRY(is_stream(stream), INVALID_HANDLE);
  TRY(!is_closed(stream), CAPTURE_IMPLICIT);
  *status = captured && stream == captured;
  return SUCCESS;
}

int cuStreamGetCtx(void *stream, Context **context) {
  *context = &primary[(uintptr_t)stream <= 2 ? device() : find(stream, 's').device];
  return SUCCESS;
}

int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
  LOG("stream=%p event=%p", stream, event);
  (void)flags;
  CONTEXT;
  TRY(find(event, 'e').address, INVALID_HANDLE);
  WORK(stream);
  TRY(!captured || (stream == captured) == (find(event, 'e').recorded == captured), spoil(CAPTURE_ISOLATION));
  return SUCCESS;
}

int cuEventCreate(void **event, unsigned flags) {
  int status = new(event, 'e');
  LOG("event=%p flags=%u", *event, flags);
  return status;
}

int cuEventDestroy_v2(void *event) {
  LOG("event=%p", event);
  return discard(event, 'e');
}

int cuEventRecord(void *event, void *stream) {
  LOG("event=%p stream=%p", event, stream);
  CONTEXT;
  TRY(find(event, 'e').address, INVALID_HANDLE);
  WORK(stream);
  pthread_mutex_lock(&lock);
  for (int k = 0; k < OBJECTS; k++)
    if (objects[k].address == event) objects[k].recorded = stream;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int cuEventQuery(void *event) {
  UNSAFE;
  return find(event, 'e').address ? SUCCESS : INVALID_HANDLE;
}

/* Kernels: a library is its name and no more. */

int cuLibraryLoadData(void **library, const void *code, int *a, void **b, unsigned c, int *d, void **e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  UNSAFE;
  TRY(!memcmp(code, "\177ELF", 4), INVALID_VALUE);
  int status = new(library, 'l');
  LOG("library=%p", *library);
  return status;
}

int cuLibraryUnload(void *library) {
  LOG("library=%p", library);
  return discard(library, 'l');
}

int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  LOG("library=%p name=%s", library, name);
  TRY(find(library, 'l').address, INVALID_HANDLE);
  *kernel = strdup(name);
  return add(*kernel, 1, 'k', 0);
}

int cuModuleLoadData(void **module, const void *code) {
  CONTEXT;
  return cuLibraryLoadData(module, code, NULL, NULL, 0, NULL, NULL, 0);
}

int cuModuleUnload(void *module) { return cuLibraryUnload(module); }

int cuModuleGetFunction(void **function, void *module, const char *name) {
  return cuLibraryGetKernel(function, module, name);
}

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream;
} LaunchConfig;

static int launch(const LaunchConfig *config, const char *kernel, void **parameters) {
  CONTEXT;
  TRY(find(kernel, 'k').address, INVALID_HANDLE);
  WORK(config->stream);
  record("launch", "%s grid=%u block=%u stream=%p device=%d", kernel, config->grid[0], config->block[0],
         config->stream, device());
  TRY(config->grid[0] && config->grid[0] < 1u << 31 && config->grid[1] == 1 && config->grid[2] == 1, INVALID_VALUE);
  TRY(config->block[0] && config->block[0] <= 1024 && config->block[1] == 1 && config->block[2] == 1, INVALID_VALUE);
  return run ? run(kernel, config->grid[0], config->block[0], parameters) : SUCCESS;
}

int cuLaunchKernelEx(const LaunchConfig *config, const char *kernel, void **parameters, void **extra) {
  (void)extra;
  return launch(config, kernel, parameters);
}

int cuLaunchKernel(const char *kernel, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  (void)extra;
  return launch(&(LaunchConfig){{x, y, z}, {bx, by, bz}, shared, stream}, kernel, parameters);
}
