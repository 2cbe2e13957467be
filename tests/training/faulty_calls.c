/* Makes one call of the C library about a file fail: to be preloaded (LD_PRELOAD), see tests/test_faulty_calls.py.

Read from the environment at the first call after it is set there, so that it may be preloaded into a process that forks:

    FAULTY_ROOTS    folders, with colons between them: only calls about what is below them are counted
    FAULTY_LOG      a file that gets a line "call<TAB>path<TAB>fired" for each such call; fired is 0 or 1
    FAULTY_CALL     the name of the call that fails,
    FAULTY_PATH     a pattern (fnmatch) that its path fits,
    FAULTY_NTH      and which of those it is, from 1
    FAULTY_ERRNO    with what
    FAULTY_LATER    "once"; "path": every later call about that path fails, too; "call": every later one of that name;
                    "disk": from then on everything that
                    needs room below the roots does (ENOSPC, EDQUOT), or everything that changes anything (EROFS),
                    or everything (others)

close() closes, and fails nevertheless, as on NFS. */

#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FILES 65536
#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })

enum { READS = 0, CHANGES = 1, NEEDS_ROOM = 2 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *path_of_file[FILES];                      /* of descriptors below the roots */
static struct { DIR *stream; char path[PATH_MAX]; } folders[64];
static const char *roots, *wanted_call, *wanted_path, *later;
static char fired_path[PATH_MAX];
static int log_file = -1, wanted_nth, wanted_errno, seen, fired;

static int configured(void) {
    if (roots) return 1;
    const char *found = getenv("FAULTY_ROOTS");
    if (!found) return 0;
    pthread_mutex_lock(&lock);
    if (!roots) {
        wanted_call = getenv("FAULTY_CALL") ? strdup(getenv("FAULTY_CALL")) : "";
        wanted_path = getenv("FAULTY_PATH") ? strdup(getenv("FAULTY_PATH")) : "";
        wanted_nth = getenv("FAULTY_NTH") ? atoi(getenv("FAULTY_NTH")) : 0;
        wanted_errno = getenv("FAULTY_ERRNO") ? atoi(getenv("FAULTY_ERRNO")) : 0;
        later = getenv("FAULTY_LATER") ? strdup(getenv("FAULTY_LATER")) : "once";
        if (getenv("FAULTY_LOG"))
            log_file = syscall(SYS_openat, AT_FDCWD, getenv("FAULTY_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        roots = strdup(found);
    }
    pthread_mutex_unlock(&lock);
    return 1;
}

static int below(const char *path) {
    if (!configured()) return 0;
    for (const char *root = roots; *root;) {
        size_t length = strcspn(root, ":");
        if (!strncmp(path, root, length) && (path[length] == '/' || !path[length])) return 1;
        root += length + (root[length] == ':');
    }
    return 0;
}

/* 0, or the number with which this call about `path` is to fail. */
static int fault(const char *call, const char *path, int kind) {
    if (!path || !below(path)) return 0;
    int number = 0;
    pthread_mutex_lock(&lock);
    if (fired) {
        int full = wanted_errno == ENOSPC || wanted_errno == EDQUOT;
        int least = full ? NEEDS_ROOM : wanted_errno == EROFS ? CHANGES : READS;
        if (!strcmp(later, "path") ? !strcmp(path, fired_path)
            : !strcmp(later, "call") ? !strcmp(call, wanted_call)
                                     : !strcmp(later, "disk") && kind >= least)
            number = wanted_errno;
    } else if (wanted_nth && !strcmp(call, wanted_call) && !fnmatch(wanted_path, path, 0) && ++seen == wanted_nth) {
        fired = 1;
        number = wanted_errno;
        snprintf(fired_path, sizeof fired_path, "%s", path);
    }
    if (log_file >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s\t%s\t%d\n", call, path, number != 0);
        syscall(SYS_write, log_file, line, length);
    }
    pthread_mutex_unlock(&lock);
    return number;
}

static const char *file(int descriptor) {
    return descriptor >= 0 && descriptor < FILES ? path_of_file[descriptor] : NULL;
}

/* The whole path of what an *at call names; "" if that is not known. */
static const char *at(int folder, const char *path, char *buffer) {
    if (!path) return "";
    if (!*path) return file(folder) ? file(folder) : "";
    if (*path == '/' || folder == AT_FDCWD) return path;
    if (!file(folder)) return "";
    snprintf(buffer, PATH_MAX, "%s/%s", file(folder), path);
    return buffer;
}

static void opened(int descriptor, const char *path) {
    if (descriptor < 0 || descriptor >= FILES) return;
    char *known = path && below(path) ? strdup(path) : NULL;
    pthread_mutex_lock(&lock);
    free(path_of_file[descriptor]);
    path_of_file[descriptor] = known;
    pthread_mutex_unlock(&lock);
}

#define FAIL_IF(call, path, kind, failed)                  \
    do {                                                   \
        int number_ = fault(call, path, kind);             \
        if (number_) { errno = number_; return failed; }   \
    } while (0)

/* To make a file needs room, to open one that is there does not. */
static int kind_of_open(const char *path, int flags) {
    if (flags & O_CREAT && syscall(SYS_access, path, F_OK)) return NEEDS_ROOM;
    return flags & (O_WRONLY | O_RDWR) ? CHANGES : READS;
}

#define OPEN(name)                                                                     \
    int name(const char *path, int flags, ...) {                                       \
        va_list rest;                                                                  \
        va_start(rest, flags);                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;        \
        va_end(rest);                                                                  \
        FAIL_IF(flags & O_CREAT ? "create" : "open", path, kind_of_open(path, flags), -1); \
        int descriptor = REAL(name)(path, flags, mode);                                \
        opened(descriptor, path);                                                      \
        return descriptor;                                                             \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                   \
    int name(int folder, const char *given, int flags, ...) {                          \
        va_list rest;                                                                  \
        va_start(rest, flags);                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;        \
        va_end(rest);                                                                  \
        char buffer[PATH_MAX];                                                         \
        const char *path = at(folder, given, buffer);                                  \
        FAIL_IF(flags & O_CREAT ? "create" : "open", path, kind_of_open(path, flags), -1); \
        int descriptor = REAL(name)(folder, given, flags, mode);                       \
        opened(descriptor, path);                                                      \
        return descriptor;                                                             \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int descriptor) {
    const char *path = file(descriptor);
    int number = fault("close", path, READS);
    if (path) opened(descriptor, NULL);
    int status = REAL(close)(descriptor);
    if (number) { errno = number; return -1; }
    return status;
}

/* os.dup: a copy of a descriptor is about the same path. */
#define FCNTL(name)                                                                    \
    int name(int descriptor, int command, ...) {                                       \
        va_list rest;                                                                  \
        va_start(rest, command);                                                       \
        void *argument = va_arg(rest, void *);                                         \
        va_end(rest);                                                                  \
        int result = REAL(name)(descriptor, command, argument);                        \
        if (command == F_DUPFD_CLOEXEC) opened(result, file(descriptor));              \
        return result;                                                                 \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

#define OF_FILE(type, name, call, kind, parameters, ...) \
    type name parameters {                               \
        FAIL_IF(call, file(descriptor), kind, (type)-1); \
        return REAL(name)(__VA_ARGS__);                  \
    }
OF_FILE(ssize_t, read, "read", READS, (int descriptor, void *to, size_t n), descriptor, to, n)
OF_FILE(ssize_t, pread, "read", READS, (int descriptor, void *to, size_t n, off_t at_), descriptor, to, n, at_)
OF_FILE(ssize_t, pread64, "read", READS, (int descriptor, void *to, size_t n, off64_t at_), descriptor, to, n, at_)
OF_FILE(ssize_t, write, "write", NEEDS_ROOM, (int descriptor, const void *from, size_t n), descriptor, from, n)
OF_FILE(ssize_t, pwrite64, "write", NEEDS_ROOM, (int descriptor, const void *from, size_t n, off64_t at_), descriptor,
        from, n, at_)
OF_FILE(int, fsync, "fsync", CHANGES, (int descriptor), descriptor)
OF_FILE(int, fdatasync, "fsync", CHANGES, (int descriptor), descriptor)
OF_FILE(int, fchmod, "chmod", CHANGES, (int descriptor, mode_t mode), descriptor, mode)
OF_FILE(int, ftruncate64, "truncate", CHANGES, (int descriptor, off64_t size), descriptor, size)
OF_FILE(int, fstat, "stat", READS, (int descriptor, struct stat *to), descriptor, to)
OF_FILE(int, fstat64, "stat", READS, (int descriptor, struct stat64 *to), descriptor, to)
OF_FILE(int, fstatvfs64, "statvfs", READS, (int descriptor, struct statvfs64 *to), descriptor, to)

#define MAP(name, place)                                                                        \
    void *name(void *address, size_t n, int protection, int flags, int descriptor, place at_) { \
        if (!(flags & MAP_ANONYMOUS)) FAIL_IF("mmap", file(descriptor), READS, MAP_FAILED);     \
        return REAL(name)(address, n, protection, flags, descriptor, at_);                      \
    }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

#define OF_PATH(name, call, kind, parameters, ...) \
    int name parameters {                          \
        FAIL_IF(call, path, kind, -1);             \
        return REAL(name)(__VA_ARGS__);            \
    }
OF_PATH(stat, "stat", READS, (const char *path, struct stat *to), path, to)
OF_PATH(stat64, "stat", READS, (const char *path, struct stat64 *to), path, to)
OF_PATH(lstat, "stat", READS, (const char *path, struct stat *to), path, to)
OF_PATH(lstat64, "stat", READS, (const char *path, struct stat64 *to), path, to)
OF_PATH(statvfs64, "statvfs", READS, (const char *path, struct statvfs64 *to), path, to)
OF_PATH(access, "access", READS, (const char *path, int mode), path, mode)
OF_PATH(chmod, "chmod", CHANGES, (const char *path, mode_t mode), path, mode)
OF_PATH(truncate64, "truncate", CHANGES, (const char *path, off64_t size), path, size)
OF_PATH(mkdir, "mkdir", NEEDS_ROOM, (const char *path, mode_t mode), path, mode)
OF_PATH(rmdir, "rmdir", CHANGES, (const char *path), path)
OF_PATH(unlink, "unlink", CHANGES, (const char *path), path)

#define AT_PATH(name, call, kind, parameters, ...)                 \
    int name parameters {                                          \
        char buffer[PATH_MAX];                                     \
        FAIL_IF(call, at(folder, given, buffer), kind, -1);        \
        return REAL(name)(__VA_ARGS__);                            \
    }
AT_PATH(fstatat, "stat", READS, (int folder, const char *given, struct stat *to, int flags), folder, given, to, flags)
AT_PATH(fstatat64, "stat", READS, (int folder, const char *given, struct stat64 *to, int flags), folder, given, to,
        flags)
AT_PATH(statx, "stat", READS, (int folder, const char *given, int flags, unsigned mask, struct statx *to), folder, given,
        flags, mask, to)
AT_PATH(faccessat, "access", READS, (int folder, const char *given, int mode, int flags), folder, given, mode, flags)
AT_PATH(mkdirat, "mkdir", NEEDS_ROOM, (int folder, const char *given, mode_t mode), folder, given, mode)
AT_PATH(unlinkat, "unlink", CHANGES, (int folder, const char *given, int flags), folder, given, flags)
AT_PATH(utimensat, "utimens", CHANGES, (int folder, const char *given, const struct timespec times[2], int flags), folder,
        given, times, flags)

#define TWO_PATHS(name, call)                                   \
    int name(const char *from, const char *to) {                \
        FAIL_IF(call, to, CHANGES, -1);                         \
        return REAL(name)(from, to);                            \
    }
TWO_PATHS(rename, "rename")
TWO_PATHS(link, "link")

int renameat(int from_folder, const char *from, int folder, const char *given) {
    char buffer[PATH_MAX];
    FAIL_IF("rename", at(folder, given, buffer), CHANGES, -1);
    return REAL(renameat)(from_folder, from, folder, given);
}

int linkat(int from_folder, const char *from, int folder, const char *given, int flags) {
    char buffer[PATH_MAX];
    FAIL_IF("link", at(folder, given, buffer), CHANGES, -1);
    return REAL(linkat)(from_folder, from, folder, given, flags);
}

static DIR *remember(DIR *stream, const char *path) {
    if (!stream || !path || !below(path)) return stream;
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < sizeof folders / sizeof *folders; i++)
        if (!folders[i].stream) {
            folders[i].stream = stream;
            snprintf(folders[i].path, PATH_MAX, "%s", path);
            break;
        }
    pthread_mutex_unlock(&lock);
    return stream;
}

DIR *opendir(const char *path) {
    FAIL_IF("opendir", path, READS, NULL);
    return remember(REAL(opendir)(path), path);
}

DIR *fdopendir(int descriptor) {
    FAIL_IF("opendir", file(descriptor), READS, NULL);
    return remember(REAL(fdopendir)(descriptor), file(descriptor));
}

int closedir(DIR *stream) {
    int descriptor = dirfd(stream);
    pthread_mutex_lock(&lock);
    for (unsigned i = 0; i < sizeof folders / sizeof *folders; i++)
        if (folders[i].stream == stream) folders[i].stream = NULL;
    pthread_mutex_unlock(&lock);
    if (file(descriptor)) opened(descriptor, NULL);
    return REAL(closedir)(stream);
}

struct dirent64 *readdir64(DIR *stream) {
    for (unsigned i = 0; i < sizeof folders / sizeof *folders; i++)
        if (folders[i].stream == stream) FAIL_IF("readdir", folders[i].path, READS, NULL);
    return REAL(readdir64)(stream);
}
