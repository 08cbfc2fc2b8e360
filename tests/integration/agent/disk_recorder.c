/* Preloaded into a process: writes down, in order, what it does to the files below a folder, so that a test can tell what a power
 * cut at any moment may leave of them. For one thread. SKERRY_BELOW: the folder, with its last slash; SKERRY_RECORD: the log. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_FILES 4096

static char *names[MOST_FILES];
static int record_fd = -1;

static void put(const void *data, size_t size) {
    const char *at = data;
    while (size > 0) {
        long n = syscall(SYS_write, record_fd, at, size);
        if (n <= 0) abort();
        at += n;
        size -= (size_t)n;
    }
}

static void note(char what, const char *name, int64_t offset, const void *data, int64_t size) {
    int64_t head[4] = {what, (int64_t)strlen(name), offset, size};
    if (record_fd < 0) {
        record_fd = (int)syscall(SYS_openat, AT_FDCWD, getenv("SKERRY_RECORD"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (record_fd < 0) abort();
    }
    put(head, sizeof head);
    put(name, strlen(name));
    if (data != NULL) put(data, (size_t)size);
}

static const char *name_of(int fd) { return fd >= 0 && fd < MOST_FILES ? names[fd] : NULL; }

static int opened(int fd, const char *path) {
    const char *below = getenv("SKERRY_BELOW");
    if (fd >= 0 && fd < MOST_FILES) {
        free(names[fd]);
        names[fd] = below != NULL && strncmp(path, below, strlen(below)) == 0 ? strdup(path + strlen(below)) : NULL;
    }
    return fd;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                        \
    int name(const char *path, int flags, ...) {          \
        mode_t mode = 0;                                  \
        if (flags & (O_CREAT | O_TMPFILE)) {              \
            va_list more;                                 \
            va_start(more, flags);                        \
            mode = va_arg(more, mode_t);                  \
            va_end(more);                                 \
        }                                                 \
        return opened(REAL(name)(path, flags, mode), path); \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    if (fd >= 0 && fd < MOST_FILES) {
        free(names[fd]);
        names[fd] = NULL;
    }
    return REAL(close)(fd);
}

#define PWRITE(name)                                                        \
    ssize_t name(int fd, const void *data, size_t size, off64_t offset) {   \
        ssize_t n = REAL(name)(fd, data, size, offset);                     \
        if (n > 0 && name_of(fd) != NULL) note('W', name_of(fd), offset, data, n); \
        return n;                                                           \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t n = REAL(write)(fd, data, size);
    if (n > 0 && name_of(fd) != NULL) note('W', name_of(fd), -1, data, n);
    return n;
}

#define TRUNCATE(name)                                             \
    int name(int fd, off64_t size) {                               \
        int result = REAL(name)(fd, size);                         \
        if (result == 0 && name_of(fd) != NULL) note('T', name_of(fd), size, NULL, 0); \
        return result;                                             \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int unlink(const char *path) {
    const char *below = getenv("SKERRY_BELOW");
    int result = REAL(unlink)(path);
    if (result == 0 && below != NULL && strncmp(path, below, strlen(below)) == 0) note('U', path + strlen(below), 0, NULL, 0);
    return result;
}

#define SYNC(name)                                                 \
    int name(int fd) {                                             \
        int result = REAL(name)(fd);                               \
        if (result == 0 && name_of(fd) != NULL) note('S', name_of(fd), 0, NULL, 0); \
        return result;                                             \
    }
SYNC(fsync)
SYNC(fdatasync)
