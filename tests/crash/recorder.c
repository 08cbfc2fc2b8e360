/* Preloaded into processes: writes down, in one order for all of them, every call that changes what lies below a folder, and every
 * call that brings such a change to disk. A test makes of that record what a power cut between any two calls may leave.
 *
 * SKERRY_BELOW: the folder, absolute, without its last slash. SKERRY_RECORD: the record, which lies elsewhere.
 * One lock is held over the call and its entry, by threads and processes alike, so that the order of entries is the order of calls.
 * Files are told by their inode: a name may be another's by the time of a write. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static size_t below_size;
static int record_fd = -1;
static pid_t record_owner;
static pthread_mutex_t own = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    const char *found = getenv("SKERRY_BELOW");
    if (found != NULL && strlen(found) < sizeof below) strcpy(below, found);
    below_size = strlen(below);
}

static void fail(const char *why) {
    dprintf(2, "recorder: %s: %s\n", why, strerror(errno));
    _exit(97);
}

/* What stands behind the folder, "" for the folder itself; NULL for a path elsewhere. */
static const char *inside(const char *path) {
    if (below_size == 0 || strncmp(path, below, below_size) != 0) return NULL;
    if (path[below_size] == '\0') return path + below_size;
    return path[below_size] == '/' ? path + below_size + 1 : NULL;
}

static int path_of(int fd, char *into) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, into, PATH_MAX - 1);
    if (n < 0) return 0;
    into[n] = '\0';
    return 1;
}

/* The path below the folder that a call names; NULL for one elsewhere. */
static const char *named(int folder, const char *path, char *into) {
    if (below_size == 0) return NULL;
    if (path[0] == '/') {
        const char *found = inside(path);
        return found != NULL ? strcpy(into, found) : NULL;
    }
    char start[PATH_MAX];
    if (folder == AT_FDCWD ? getcwd(start, sizeof start) == NULL : !path_of(folder, start)) return NULL;
    const char *found = inside(start);
    if (found == NULL) return NULL;
    if (snprintf(into, PATH_MAX, "%s%s%s", found, *found ? "/" : "", path) >= PATH_MAX) fail("a path is too long");
    return into;
}

/* Whether a descriptor is of a file or folder below, removed ones included. */
static int ours(int fd, struct stat *found) {
    if (below_size == 0) return 0;
    int before = errno;
    char path[PATH_MAX];
    int yes = fstat(fd, found) == 0 && (S_ISREG(found->st_mode) || S_ISDIR(found->st_mode)) && path_of(fd, path) && inside(path) != NULL;
    errno = before;
    return yes;
}

static void enter(void) {
    pthread_mutex_lock(&own);
    if (record_owner != getpid()) {
        /* A descriptor that came over a fork shares its lock. */
        record_fd = (int)syscall(SYS_openat, AT_FDCWD, getenv("SKERRY_RECORD"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (record_fd < 0) fail("no record");
        record_owner = getpid();
    }
    while (syscall(SYS_flock, record_fd, LOCK_EX) != 0)
        if (errno != EINTR) fail("no lock");
}

static void leave(void) {
    int before = errno;
    syscall(SYS_flock, record_fd, LOCK_UN);
    pthread_mutex_unlock(&own);
    errno = before;
}

static void put(const void *data, size_t size) {
    const char *at = data;
    while (size > 0) {
        long n = syscall(SYS_write, record_fd, at, size);
        if (n <= 0) fail("record not written");
        at += n;
        size -= (size_t)n;
    }
}

static void note(char what, const char *name, const char *other, uint64_t inode, int64_t offset, int64_t size, const void *data) {
    int before = errno;
    int64_t head[8] = {what, (int64_t)strlen(name), (int64_t)strlen(other), (int64_t)inode, offset, size, data != NULL ? size : 0, getpid()};
    char *all = malloc(sizeof head + (size_t)head[1] + (size_t)head[2]);
    if (all == NULL) fail("no memory");
    memcpy(all, head, sizeof head);
    memcpy(all + sizeof head, name, (size_t)head[1]);
    memcpy(all + sizeof head + head[1], other, (size_t)head[2]);
    put(all, sizeof head + (size_t)head[1] + (size_t)head[2]);
    free(all);
    if (data != NULL) put(data, (size_t)size);
    errno = before;
}

/* The bytes that a call has just written, read back: they came from another file or from several buffers. */
static void note_written(int fd, uint64_t inode, int64_t offset, int64_t size) {
    int before = errno;
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    char *data = malloc((size_t)size);
    int again = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (data == NULL || again < 0) fail("cannot read back");
    for (int64_t at = 0; at < size;) {
        long n = syscall(SYS_pread64, again, data + at, (size_t)(size - at), offset + at);
        if (n <= 0) fail("cannot read back");
        at += n;
    }
    syscall(SYS_close, again);
    note('W', "", "", inode, offset, size, data);
    free(data);
    errno = before;
}

/* --- names --- */

static int open_noted(int folder, const char *path, int flags, mode_t mode) {
    char name[PATH_MAX];
    int writes = (flags & (O_CREAT | O_TRUNC)) != 0;
    if ((flags & O_TMPFILE) == O_TMPFILE || !writes || named(folder, path, name) == NULL)
        return REAL(openat)(folder, path, flags, mode);
    enter();
    struct stat before, after;
    int was = fstatat(folder, path, &before, 0) == 0;
    int fd = REAL(openat)(folder, path, flags, mode);
    if (fd >= 0 && fstat(fd, &after) == 0 && S_ISREG(after.st_mode)) {
        if (!was) note('C', name, "", after.st_ino, 0, 0, NULL);
        else if (flags & O_TRUNC && before.st_size > 0) note('T', "", "", after.st_ino, 0, 0, NULL);
    }
    leave();
    return fd;
}

#define MODE(flags)                          \
    mode_t mode = 0;                         \
    if ((flags) & (O_CREAT | O_TMPFILE)) {   \
        va_list more;                        \
        va_start(more, flags);               \
        mode = va_arg(more, mode_t);         \
        va_end(more);                        \
    }
int open(const char *path, int flags, ...) { MODE(flags) return open_noted(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_noted(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) return open_noted(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags) return open_noted(folder, path, flags | O_LARGEFILE, mode); }
int creat(const char *path, mode_t mode) { return open_noted(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* CALL with what it names held apart: NOTE runs when it went well, under the lock. */
#define NAMED(folder, path, call, NOTE)                       \
    char name[PATH_MAX];                                      \
    if (named(folder, path, name) == NULL) return call;       \
    enter();                                                  \
    int result = call;                                        \
    if (result == 0) { NOTE; }                                \
    leave();                                                  \
    return result;

static uint64_t inode_of(int folder, const char *path) {
    struct stat found;
    return fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW) == 0 ? found.st_ino : 0;
}

static void note_removed(int folder, const char *path, const char *name, int flags) {
    note(flags & AT_REMOVEDIR ? 'X' : 'U', name, "", 0, 0, 0, NULL);
    (void)folder, (void)path;
}

int mkdirat(int folder, const char *path, mode_t mode) {
    NAMED(folder, path, REAL(mkdirat)(folder, path, mode), note('D', name, "", inode_of(folder, path), 0, 0, NULL))
}
int mkdir(const char *path, mode_t mode) {
    NAMED(AT_FDCWD, path, REAL(mkdir)(path, mode), note('D', name, "", inode_of(AT_FDCWD, path), 0, 0, NULL))
}
int unlinkat(int folder, const char *path, int flags) {
    NAMED(folder, path, REAL(unlinkat)(folder, path, flags), note_removed(folder, path, name, flags))
}
int unlink(const char *path) { NAMED(AT_FDCWD, path, REAL(unlink)(path), note_removed(AT_FDCWD, path, name, 0)) }
int rmdir(const char *path) { NAMED(AT_FDCWD, path, REAL(rmdir)(path), note_removed(AT_FDCWD, path, name, AT_REMOVEDIR)) }
int symlinkat(const char *target, int folder, const char *path) {
    NAMED(folder, path, REAL(symlinkat)(target, folder, path), note('L', name, target, inode_of(folder, path), 0, 0, NULL))
}
int symlink(const char *target, const char *path) {
    NAMED(AT_FDCWD, path, REAL(symlink)(target, path), note('L', name, target, inode_of(AT_FDCWD, path), 0, 0, NULL))
}

/* Both names are below, or the test fails: nothing comes in or goes out by a rename or a link. */
#define PAIRED(from_folder, from, to_folder, to, call, what)                                   \
    char name[PATH_MAX], other[PATH_MAX];                                                      \
    const char *first = named(from_folder, from, name), *second = named(to_folder, to, other); \
    if (first == NULL && second == NULL) return call;                                          \
    if (first == NULL || second == NULL) fail("a name crosses the edge of what is recorded");  \
    enter();                                                                                   \
    int result = call;                                                                         \
    if (result == 0) note(what, name, other, 0, 0, 0, NULL);                                   \
    leave();                                                                                   \
    return result;
int rename(const char *from, const char *to) { PAIRED(AT_FDCWD, from, AT_FDCWD, to, REAL(rename)(from, to), 'R') }
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    PAIRED(from_folder, from, to_folder, to, REAL(renameat)(from_folder, from, to_folder, to), 'R')
}
int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    PAIRED(from_folder, from, to_folder, to, REAL(renameat2)(from_folder, from, to_folder, to, flags), flags & RENAME_EXCHANGE ? 'E' : 'R')
}
int link(const char *from, const char *to) { PAIRED(AT_FDCWD, from, AT_FDCWD, to, REAL(link)(from, to), 'H') }
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    PAIRED(from_folder, from, to_folder, to, REAL(linkat)(from_folder, from, to_folder, to, flags), 'H')
}

/* --- contents --- */

#define WRITTEN(call, NOTE)                     \
    struct stat found;                          \
    if (!ours(fd, &found)) return call;         \
    enter();                                    \
    ssize_t n = call;                           \
    if (n > 0) { NOTE; }                        \
    leave();                                    \
    return n;
#define BEHIND (lseek(fd, 0, SEEK_CUR) - n)
ssize_t write(int fd, const void *data, size_t size) {
    WRITTEN(REAL(write)(fd, data, size), note('W', "", "", found.st_ino, BEHIND, n, data))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    WRITTEN(REAL(pwrite)(fd, data, size, at), note('W', "", "", found.st_ino, at, n, data))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    WRITTEN(REAL(pwrite64)(fd, data, size, at), note('W', "", "", found.st_ino, at, n, data))
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    WRITTEN(REAL(writev)(fd, parts, count), note_written(fd, found.st_ino, BEHIND, n))
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    WRITTEN(REAL(pwritev)(fd, parts, count, at), note_written(fd, found.st_ino, at, n))
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) {
    WRITTEN(REAL(pwritev64)(fd, parts, count, at), note_written(fd, found.st_ino, at, n))
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    WRITTEN(REAL(pwritev64v2)(fd, parts, count, at, flags), note_written(fd, found.st_ino, at, n))
}
ssize_t sendfile(int fd, int from, off_t *at, size_t size) {
    WRITTEN(REAL(sendfile)(fd, from, at, size), note_written(fd, found.st_ino, BEHIND, n))
}
ssize_t sendfile64(int fd, int from, off64_t *at, size_t size) {
    WRITTEN(REAL(sendfile64)(fd, from, at, size), note_written(fd, found.st_ino, BEHIND, n))
}
ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at, size_t size, unsigned flags) {
    int64_t start = at != NULL ? *at : lseek(fd, 0, SEEK_CUR);
    WRITTEN(REAL(copy_file_range)(from, from_at, fd, at, size, flags), note_written(fd, found.st_ino, start, n))
}

#define ON_FILE(call, NOTE)                     \
    struct stat found;                          \
    if (!ours(fd, &found)) return call;         \
    enter();                                    \
    int result = call;                          \
    if (result == 0) { NOTE; }                  \
    leave();                                    \
    return result;
int ftruncate(int fd, off_t size) { ON_FILE(REAL(ftruncate)(fd, size), note('T', "", "", found.st_ino, 0, size, NULL)) }
int ftruncate64(int fd, off64_t size) { ON_FILE(REAL(ftruncate64)(fd, size), note('T', "", "", found.st_ino, 0, size, NULL)) }
int posix_fallocate(int fd, off_t at, off_t size) { ON_FILE(REAL(posix_fallocate)(fd, at, size), note('A', "", "", found.st_ino, at, size, NULL)) }
int posix_fallocate64(int fd, off64_t at, off64_t size) { ON_FILE(REAL(posix_fallocate64)(fd, at, size), note('A', "", "", found.st_ino, at, size, NULL)) }
int fallocate(int fd, int mode, off_t at, off_t size) {
    ON_FILE(REAL(fallocate)(fd, mode, at, size), if (mode != 0) fail("fallocate in a mode that is not modelled"); note('A', "", "", found.st_ino, at, size, NULL))
}
int fallocate64(int fd, int mode, off64_t at, off64_t size) {
    ON_FILE(REAL(fallocate64)(fd, mode, at, size), if (mode != 0) fail("fallocate in a mode that is not modelled"); note('A', "", "", found.st_ino, at, size, NULL))
}
int truncate(const char *path, off_t size) {
    NAMED(AT_FDCWD, path, REAL(truncate)(path, size), note('T', "", "", inode_of(AT_FDCWD, path), 0, size, NULL))
}
int truncate64(const char *path, off64_t size) {
    NAMED(AT_FDCWD, path, REAL(truncate64)(path, size), note('T', "", "", inode_of(AT_FDCWD, path), 0, size, NULL))
}
int fsync(int fd) { ON_FILE(REAL(fsync)(fd), note('S', "", "", found.st_ino, 0, 0, NULL)) }
int fdatasync(int fd) { ON_FILE(REAL(fdatasync)(fd), note('S', "", "", found.st_ino, 0, 0, NULL)) }

/* What is written through memory is not seen: such files are only told. */
static void mapped(int protection, int flags, int fd) {
    struct stat found;
    if (fd < 0 || !(protection & PROT_WRITE) || !(flags & MAP_SHARED) || !ours(fd, &found)) return;
    enter();
    note('M', "", "", found.st_ino, 0, 0, NULL);
    leave();
}
void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    mapped(protection, flags, fd);
    return (void *)syscall(SYS_mmap, at, size, protection, flags, fd, offset);
}
void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset) {
    mapped(protection, flags, fd);
    return (void *)syscall(SYS_mmap, at, size, protection, flags, fd, offset);
}
