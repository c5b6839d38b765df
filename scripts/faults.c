/* Lets calls on files below a folder fail as a disk would: preloaded by faults.py, which arms it in each process.

   Calls are counted as they come, and the n-th of the chosen kinds (or it and all later ones) fails with a given errno. A log
   of the calls, one a line, goes to a descriptor, so that every one can be made to fail in turn. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, WRITE = 2, RENAME = 4, SYNC = 8, REMOVE = 16, READ = 32, LOCK = 64, OPEN = 128 };

static char folder[PATH_MAX];
static int kinds, failing, sticky, notes = -1;
static long wanted, count;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

void faults_arm(const char *below, int of, int error, long number, int on, int log) {
  strncpy(folder, below, sizeof folder - 1);
  kinds = of, failing = error, wanted = number, sticky = on, notes = log, count = 0;
}

static int fails(int kind, const char *name, const char *path) {
  if (!(kinds & kind) || !*folder || strncmp(path, folder, strlen(folder))) return 0;
  pthread_mutex_lock(&turn);
  long number = ++count;
  pthread_mutex_unlock(&turn);
  int hit = wanted && (number == wanted || (sticky && number > wanted));
  if (notes >= 0 && (!wanted || number == wanted)) dprintf(notes, "%ld %d %s %s\n", number, kind, name, path + strlen(folder));
  if (hit) errno = failing;
  return hit;
}

static int fails_at(int kind, const char *name, int at, const char *path) {
  char whole[PATH_MAX * 2], base[PATH_MAX];
  if (!(kinds & kind)) return 0;
  if (path[0] == '/') return fails(kind, name, path);
  if (at == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) return 0;
  } else {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, base, sizeof base - 1);
    if (length < 0) return 0;
    base[length] = 0;
  }
  snprintf(whole, sizeof whole, "%s/%s", base, path);
  return fails(kind, name, whole);
}

static int fails_on(int kind, const char *name, int handle) {
  char link[64], path[PATH_MAX];
  if (!(kinds & kind)) return 0;
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return 0;
  path[length] = 0;
  return fails(kind, name, path);
}

#define REAL(type, name, ...)                                   \
  static type (*real)(__VA_ARGS__);                             \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPENS(name)                                                                          \
  int name(const char *path, int flags, ...) {                                               \
    REAL(int, #name, const char *, int, ...);                                                \
    mode_t mode = 0;                                                                         \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                     \
      va_list rest;                                                                          \
      va_start(rest, flags);                                                                 \
      mode = va_arg(rest, mode_t);                                                           \
      va_end(rest);                                                                          \
    }                                                                                        \
    int kind = flags & (O_WRONLY | O_RDWR | O_CREAT) ? CREATE : OPEN;                        \
    return fails_at(kind, #name, AT_FDCWD, path) ? -1 : real(path, flags, mode);             \
  }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                                       \
  int name(int at, const char *path, int flags, ...) {                                       \
    REAL(int, #name, int, const char *, int, ...);                                           \
    mode_t mode = 0;                                                                         \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                     \
      va_list rest;                                                                          \
      va_start(rest, flags);                                                                 \
      mode = va_arg(rest, mode_t);                                                           \
      va_end(rest);                                                                          \
    }                                                                                        \
    int kind = flags & (O_WRONLY | O_RDWR | O_CREAT) ? CREATE : OPEN;                        \
    return fails_at(kind, #name, at, path) ? -1 : real(at, path, flags, mode);               \
  }
OPENS_AT(openat)
OPENS_AT(openat64)

#define ON(type, name, kind, handle, call, ...)                    \
  type name(__VA_ARGS__) {                                         \
    REAL(type, #name, __VA_ARGS__);                                \
    return fails_on(kind, #name, handle) ? (type)-1 : real call;   \
  }
ON(ssize_t, write, WRITE, file, (file, data, size), int file, const void *data, size_t size)
ON(ssize_t, pwrite, WRITE, file, (file, data, size, at), int file, const void *data, size_t size, off_t at)
ON(ssize_t, pwrite64, WRITE, file, (file, data, size, at), int file, const void *data, size_t size, off64_t at)
ON(ssize_t, writev, WRITE, file, (file, parts, number), int file, const struct iovec *parts, int number)
ON(int, ftruncate, WRITE, file, (file, size), int file, off_t size)
ON(int, ftruncate64, WRITE, file, (file, size), int file, off64_t size)
ON(int, fsync, SYNC, file, (file), int file)
ON(int, fdatasync, SYNC, file, (file), int file)
ON(ssize_t, read, READ, file, (file, data, size), int file, void *data, size_t size)
ON(ssize_t, readv, READ, file, (file, parts, number), int file, const struct iovec *parts, int number)
ON(ssize_t, pread, READ, file, (file, data, size, at), int file, void *data, size_t size, off_t at)
ON(ssize_t, pread64, READ, file, (file, data, size, at), int file, void *data, size_t size, off64_t at)
ON(int, flock, LOCK, file, (file, how), int file, int how)

ssize_t copy_file_range(int from, off64_t *at, int file, off64_t *to, size_t size, unsigned flags) {
  REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
  if (fails_on(READ, "copy_file_range", from) || fails_on(WRITE, "copy_file_range", file)) return -1;
  return real(from, at, file, to, size, flags);
}

#define SENDS(name)                                                                                  \
  ssize_t name(int file, int from, off64_t *at, size_t size) {                                       \
    REAL(ssize_t, #name, int, int, off64_t *, size_t);                                               \
    if (fails_on(READ, #name, from) || fails_on(WRITE, #name, file)) return -1;                      \
    return real(file, from, at, size);                                                               \
  }
SENDS(sendfile)
SENDS(sendfile64)

#define PATHS(name, kind, call, at, path, ...)                            \
  int name(__VA_ARGS__) {                                                 \
    REAL(int, #name, __VA_ARGS__);                                        \
    return fails_at(kind, #name, at, path) ? -1 : real call;              \
  }
PATHS(rename, RENAME, (from, to), AT_FDCWD, to, const char *from, const char *to)
PATHS(renameat, RENAME, (at, from, into, to), into, to, int at, const char *from, int into, const char *to)
PATHS(mkdir, CREATE, (path, mode), AT_FDCWD, path, const char *path, mode_t mode)
PATHS(mkdirat, CREATE, (at, path, mode), at, path, int at, const char *path, mode_t mode)
PATHS(unlink, REMOVE, (path), AT_FDCWD, path, const char *path)
PATHS(unlinkat, REMOVE, (at, path, flags), at, path, int at, const char *path, int flags)
PATHS(rmdir, REMOVE, (path), AT_FDCWD, path, const char *path)
