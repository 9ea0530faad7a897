// Between a process and the files under one directory, for tests (LD_PRELOAD): system calls that fail, are short, sleep
// or are the last thing the process does, by rules; and a record of what was written and what was synced, from which
// `replay.py` makes what a power cut would have left. Controlled by the process itself, through ctypes
// (`preloaded.py`).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OP_READ = 1, OP_WRITE = 2, OP_SYNC = 4, OP_META = 8 };
enum { ACT_ERRNO = 1, ACT_SHORT = 2, ACT_DIE = 3, ACT_SLEEP = 4 };
enum {
    REC_WRITE = 1,
    REC_END,
    REC_SYNC,
    REC_TRUNCATE,
    REC_PUNCH,
    REC_CREATE,
    REC_UNLINK,
    REC_RENAME,
    REC_MKDIR,
    REC_NOTE
};
enum { MAX_FDS = 65536, MAX_RULES = 16, NAME_BYTES = 96 };

struct rule {
    int ops, action;
    char part[NAME_BYTES];
    double probability, arg;
    long skip, count;  // of matching calls: how many pass first, how many the rule then has left
};
struct record {
    uint32_t kind, length;
    uint64_t id, inode;
    int64_t offset, size;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[4096];
static size_t root_length;
static char names[MAX_FDS][NAME_BYTES];  // last part of the path; empty for files that are none of our business
static struct rule rules[MAX_RULES];
static int num_rules, record_fd = -1;
static int64_t budget = -1;
static uint64_t next_id = 1, random_state = 88172645463325252ull, num_done;

#define REAL(result, name, ...)         \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static double chance(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (double)(random_state >> 11) / 9007199254740992.0;
}

// ---- control

void crash_begin(const char* directory, uint64_t seed) {
    random_state = seed * 2654435761u + 88172645463325252ull;
    root_length = strlen(strncpy(root, directory, sizeof root - 1));
}
void crash_rule(int ops, const char* part, double probability, long skip, long count, int action, double arg) {
    pthread_mutex_lock(&lock);
    if (num_rules < MAX_RULES) {
        struct rule* rule = &rules[num_rules++];
        *rule = (struct rule){ops, action, {0}, probability, arg, skip, count};
        strncpy(rule->part, part, NAME_BYTES - 1);
    }
    pthread_mutex_unlock(&lock);
}
void crash_budget(int64_t num_bytes) {
    budget = num_bytes;
}
void crash_clear(void) {
    pthread_mutex_lock(&lock);
    num_rules = 0;
    budget = -1;
    pthread_mutex_unlock(&lock);
}
uint64_t crash_num_done(void) {
    return num_done;
}
void crash_record(const char* path) {
    record_fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

// ---- the record

static uint64_t append(uint32_t kind, uint64_t id, uint64_t inode, int64_t offset, int64_t size,
                       const struct iovec* parts, int num_parts) {
    if (record_fd < 0) return 0;
    struct iovec all[1026];
    struct record record = {kind, 0, id, inode, offset, size};
    if (num_parts > 1025) num_parts = 1025;
    for (int i = 0; i < num_parts; i++) {
        all[i + 1] = parts[i];
        record.length += parts[i].iov_len;
    }
    all[0] = (struct iovec){&record, sizeof record};
    pthread_mutex_lock(&lock);
    if (!record.id) record.id = next_id++;
    syscall(SYS_writev, record_fd, all, num_parts + 1);
    pthread_mutex_unlock(&lock);
    return record.id;
}
static uint64_t append_text(uint32_t kind, uint64_t inode, const char* text, size_t length) {
    struct iovec part = {(void*)text, length};
    return append(kind, 0, inode, 0, 0, &part, 1);
}
static uint64_t inode_of(int fd) {
    struct stat status;
    return fstat(fd, &status) ? 0 : status.st_ino;
}
void crash_note(const char* text) {
    append_text(REC_NOTE, 0, text, strlen(text));
}
uint64_t crash_write_begins(int fd, int64_t offset, const void* data, size_t length) {
    struct iovec part = {(void*)data, length};
    return append(REC_WRITE, 0, inode_of(fd), offset, 0, &part, 1);
}
void crash_write_ended(uint64_t id) {
    append(REC_END, id, 0, 0, 0, NULL, 0);
}

// ---- rules

static int tracked(int fd) {
    return fd >= 0 && fd < MAX_FDS && names[fd][0];
}
static int under_root(const char* path) {
    return root_length && path && !strncmp(path, root, root_length);
}
static const char* last_part(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// What is to become of a call: 0 goes on; else an action, with its argument.
int crash_verdict(int op, const char* name, double* arg) {
    int action = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_rules && !action; i++) {
        struct rule* rule = &rules[i];
        if (!(rule->ops & op) || (rule->part[0] && !strstr(name, rule->part)) || !rule->count) continue;
        if (rule->skip-- > 0 || chance() >= rule->probability) continue;
        if (rule->count > 0) rule->count--;
        action = rule->action;
        *arg = rule->arg;
        num_done++;
    }
    pthread_mutex_unlock(&lock);
    return action;
}
static int failed(int op, const char* name) {  // for calls that have no half: 1 when errno says why they fail
    double arg = 0;
    switch (crash_verdict(op, name, &arg)) {
        case ACT_ERRNO:
            errno = (int)arg;
            return 1;
        case ACT_DIE:
            _exit(9);
        case ACT_SLEEP: {
            struct timespec pause = {(time_t)arg, (long)((arg - (time_t)arg) * 1e9)};
            nanosleep(&pause, NULL);
            return 0;
        }
        default:
            return 0;
    }
}

// ---- transfers: all end up here

static size_t total(const struct iovec* parts, int num_parts) {
    size_t num_bytes = 0;
    for (int i = 0; i < num_parts; i++) num_bytes += parts[i].iov_len;
    return num_bytes;
}
static ssize_t move(int is_write, int fd, const struct iovec* parts, int num_parts, off_t offset, size_t limit) {
    struct iovec cut[1024];
    int num_cut = 0;
    for (; num_cut < num_parts && num_cut < 1024 && limit; num_cut++) {
        cut[num_cut] = parts[num_cut];
        if (cut[num_cut].iov_len > limit) cut[num_cut].iov_len = limit;
        limit -= cut[num_cut].iov_len;
    }
    long call = is_write ? SYS_pwritev : SYS_preadv;
    return syscall(call, fd, cut, num_cut, (long)offset, 0L);
}
// Bytes in [start, stop) for which the disk has no room yet.
static int64_t hole_bytes(int fd, off_t start, off_t stop) {
    int64_t num_bytes = 0;
    while (start < stop) {
        off_t data = lseek(fd, start, SEEK_DATA);
        if (data < 0 || data >= stop) return num_bytes + (stop - start);
        num_bytes += data - start;
        start = lseek(fd, data, SEEK_HOLE);
        if (start < 0) break;
    }
    return num_bytes;
}
static ssize_t transfer(int is_write, int fd, const struct iovec* parts, int num_parts, off_t offset) {
    size_t num_bytes = total(parts, num_parts);
    double arg = 0;
    int action = crash_verdict(is_write ? OP_WRITE : OP_READ, names[fd], &arg);
    if (action == ACT_ERRNO) {
        errno = (int)arg;
        return -1;
    }
    if (action == ACT_DIE) {
        if (is_write) move(1, fd, parts, num_parts, offset, (size_t)((double)num_bytes * arg));
        _exit(9);
    }
    if (action == ACT_SLEEP) {
        struct timespec pause = {(time_t)arg, (long)((arg - (time_t)arg) * 1e9)};
        nanosleep(&pause, NULL);
    }
    if (action == ACT_SHORT) num_bytes = num_bytes > 1 ? 1 + (size_t)((double)(num_bytes - 1) * arg) : num_bytes;
    if (is_write && budget >= 0) {
        int64_t grown = hole_bytes(fd, offset, offset + (off_t)num_bytes);
        if (grown > 0) {
            pthread_mutex_lock(&lock);
            if (grown > budget) num_bytes = (int64_t)num_bytes > grown - budget ? num_bytes - (grown - budget) : 0;
            budget -= grown < budget ? grown : budget;
            pthread_mutex_unlock(&lock);
            if (!num_bytes) {
                num_done++;
                errno = ENOSPC;
                return -1;
            }
        }
    }
    uint64_t id = is_write ? append(REC_WRITE, 0, inode_of(fd), offset, 0, parts, num_parts) : 0;
    ssize_t moved = move(is_write, fd, parts, num_parts, offset, num_bytes);
    if (id) crash_write_ended(id);
    return moved;
}

#define TRANSFER(name, is_write, result, buffer)                     \
    ssize_t name(int fd, buffer data, size_t length, off_t offset) { \
        REAL(ssize_t, #name, int, buffer, size_t, off_t);            \
        if (!tracked(fd)) return real(fd, data, length, offset);     \
        struct iovec part = {(void*)data, length};                   \
        return transfer(is_write, fd, &part, 1, offset);             \
    }
TRANSFER(pread, 0, ssize_t, void*)
TRANSFER(pread64, 0, ssize_t, void*)
TRANSFER(pwrite, 1, ssize_t, const void*)
TRANSFER(pwrite64, 1, ssize_t, const void*)

#define VECTOR(name, is_write)                                                     \
    ssize_t name(int fd, const struct iovec* parts, int num_parts, off_t offset) { \
        REAL(ssize_t, #name, int, const struct iovec*, int, off_t);                \
        if (!tracked(fd)) return real(fd, parts, num_parts, offset);               \
        return transfer(is_write, fd, parts, num_parts, offset);                   \
    }
VECTOR(preadv, 0)
VECTOR(preadv64, 0)
VECTOR(pwritev, 1)
VECTOR(pwritev64, 1)

#define VECTOR2(name, is_write)                                                               \
    ssize_t name(int fd, const struct iovec* parts, int num_parts, off_t offset, int flags) { \
        REAL(ssize_t, #name, int, const struct iovec*, int, off_t, int);                      \
        if (!tracked(fd)) return real(fd, parts, num_parts, offset, flags);                   \
        return transfer(is_write, fd, parts, num_parts, offset);                              \
    }
VECTOR2(preadv2, 0)
VECTOR2(preadv64v2, 0)
VECTOR2(pwritev2, 1)
VECTOR2(pwritev64v2, 1)

ssize_t write(int fd, const void* data, size_t length) {
    REAL(ssize_t, "write", int, const void*, size_t);
    if (!tracked(fd)) return real(fd, data, length);
    struct iovec part = {(void*)data, length};
    off_t offset = lseek(fd, 0, SEEK_CUR);
    ssize_t moved = transfer(1, fd, &part, 1, offset);
    if (moved > 0) lseek(fd, offset + moved, SEEK_SET);
    return moved;
}

// ---- names and sizes

static int opened(int fd, const char* path, int flags, int was_there) {
    if (fd < 0 || fd >= MAX_FDS || !under_root(path)) return fd;
    names[fd][0] = 0;
    strncpy(names[fd], last_part(path), NAME_BYTES - 1);
    if (!was_there && (flags & O_CREAT))
        append_text(REC_CREATE, inode_of(fd), path, strlen(path));
    else if (flags & O_TRUNC)
        append(REC_TRUNCATE, 0, inode_of(fd), 0, 0, NULL, 0);
    return fd;
}
static int open_file(int at, const char* path, int flags, mode_t mode) {
    int was_there = !(flags & O_CREAT) || !under_root(path) || !access(path, F_OK);
    if (under_root(path) && (flags & O_CREAT) && !was_there && failed(OP_META, last_part(path))) return -1;
    return opened((int)syscall(SYS_openat, at, path, flags, mode), path, flags, was_there);
}
#define OPEN(name, extra)                                                       \
    int name(const char* path, int flags, ...) {                                \
        va_list rest;                                                           \
        va_start(rest, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                           \
        return open_file(AT_FDCWD, path, flags | (extra), mode);                \
    }
OPEN(open, 0)
OPEN(open64, O_LARGEFILE)

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < MAX_FDS) names[fd][0] = 0;
    return real(fd);
}
static int sync_file(int fd, int data_only) {
    if (failed(OP_SYNC, names[fd])) return -1;
    uint64_t id = append(REC_SYNC, 0, inode_of(fd), 0, 0, NULL, 0);
    int result =
        record_fd < 0 ? (int)syscall(data_only ? SYS_fdatasync : SYS_fsync, fd) : 0;  // a record's own disk may wait
    if (id && !result) crash_write_ended(id);
    return result;
}
int fsync(int fd) {
    REAL(int, "fsync", int);
    return tracked(fd) ? sync_file(fd, 0) : real(fd);
}
int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    return tracked(fd) ? sync_file(fd, 1) : real(fd);
}
static int truncate_file(int fd, off_t length) {
    if (failed(OP_META, names[fd])) return -1;
    append(REC_TRUNCATE, 0, inode_of(fd), 0, length, NULL, 0);
    return (int)syscall(SYS_ftruncate, fd, length);
}
int ftruncate(int fd, off_t length) {
    REAL(int, "ftruncate", int, off_t);
    return tracked(fd) ? truncate_file(fd, length) : real(fd, length);
}
int ftruncate64(int fd, off_t length) {
    REAL(int, "ftruncate64", int, off_t);
    return tracked(fd) ? truncate_file(fd, length) : real(fd, length);
}
static int allocate(int fd, int mode, off_t offset, off_t length) {
    if (failed(OP_META, names[fd])) return -1;
    if (mode & FALLOC_FL_PUNCH_HOLE) {
        append(REC_PUNCH, 0, inode_of(fd), offset, length, NULL, 0);
        if (budget >= 0) budget += length - hole_bytes(fd, offset, offset + length);
    }
    return (int)syscall(SYS_fallocate, fd, mode, offset, length);
}
int fallocate(int fd, int mode, off_t offset, off_t length) {
    REAL(int, "fallocate", int, int, off_t, off_t);
    return tracked(fd) ? allocate(fd, mode, offset, length) : real(fd, mode, offset, length);
}
int fallocate64(int fd, int mode, off_t offset, off_t length) {
    return fallocate(fd, mode, offset, length);
}
int unlink(const char* path) {
    REAL(int, "unlink", const char*);
    if (!under_root(path)) return real(path);
    if (failed(OP_META, last_part(path))) return -1;
    struct stat status;
    if (budget >= 0 && !stat(path, &status)) budget += status.st_blocks * 512;
    int result = real(path);
    if (!result) append_text(REC_UNLINK, 0, path, strlen(path));
    return result;
}
int rename(const char* from, const char* to) {
    REAL(int, "rename", const char*, const char*);
    if (!under_root(to)) return real(from, to);
    if (failed(OP_META, last_part(to))) return -1;
    int result = real(from, to);
    if (!result) {
        struct iovec parts[] = {{(void*)from, strlen(from) + 1}, {(void*)to, strlen(to)}};
        append(REC_RENAME, 0, 0, 0, 0, parts, 2);
    }
    return result;
}
int mkdir(const char* path, mode_t mode) {
    REAL(int, "mkdir", const char*, mode_t);
    int result = real(path, mode);
    if (!result && under_root(path)) append_text(REC_MKDIR, 0, path, strlen(path));
    return result;
}
