/* Fills a guest's memory for bench/store.py with what the memory of a busy machine is made of, then keeps it.
 *
 * Usage: store_filler SEED:COPIES:RECORDS:TEXT:NUMBERS:RANDOM, all but the seed in MiB (store_content.py says what each
 * stands for). It ends with 1 and a line on stderr if there is no room; otherwise it writes GV-FILLED and never ends.
 *
 * First all free memory is made zero, because Linux leaves in it whatever was there (such as the compressed archive
 * that the guest booted from, overwritten by one byte): what is not zero afterwards is what somebody keeps there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <ftw.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MIB = 1 << 20, PAGE = 4096, SPARE_MIB = 24, SPARE_SHARE = 64 };

static uint64_t state;

/* xorshift64*: fast under emulation; what it gives does not compress. */
static uint64_t draw(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1DULL;
}

static uint64_t below(uint64_t bound)
{
    return (draw() >> 16) % bound;
}

static void die(const char *what)
{
    fprintf(stderr, "store_filler: %s: %s\n", what, strerror(errno));
    exit(1);
}

static unsigned char *room(size_t bytes)
{
    unsigned char *place = mmap(NULL, bytes ? bytes : PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED)
        die("no room");
    return place;
}

static size_t free_beyond_spare(void)
{
    struct sysinfo info;
    if (sysinfo(&info) != 0)
        die("sysinfo");
    uint64_t free_bytes = (uint64_t)info.freeram * info.mem_unit;
    uint64_t spare = (uint64_t)SPARE_MIB * MIB + (uint64_t)info.totalram * info.mem_unit / SPARE_SHARE;
    return free_bytes > spare ? free_bytes - spare : 0;
}

/* Linux gives zeros to a process and lets them be when it ends. Some must stay free: what Linux reserves grows with
 * memory, and so do the tables of the pages that are taken here. */
static void clear_free_memory(void)
{
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        size_t bytes = free_beyond_spare();
        unsigned char *place = room(bytes);
        for (size_t at = 0; at < bytes && (at % MIB != 0 || free_beyond_spare() > 0); at += PAGE)
            *(volatile unsigned char *)(place + at) = 0;
        _exit(0);
    }
    int status;
    if (waitpid(child, &status, 0) != child || status != 0) {
        errno = ENOMEM;
        die("free memory was not cleared");
    }
}

static unsigned char *copies, *copies_end;

static int copy_one(const char *path, const struct stat *info, int kind)
{
    size_t left = copies_end - copies;
    if (kind != FTW_F || left == 0 || info->st_size == 0)
        return 0;
    int file = open(path, O_RDONLY);
    if (file < 0)
        die(path);
    size_t wanted = (size_t)info->st_size < left ? (size_t)info->st_size : left;
    ssize_t got = read(file, copies, wanted);
    if (got < 0)
        die(path);
    close(file);
    size_t pages = ((size_t)got + PAGE - 1) / PAGE * PAGE;
    copies += pages < left ? pages : left;
    return 0;
}

/* A program that has read files has their pages a second time. */
static void fill_copies(size_t bytes)
{
    copies = room(bytes);
    copies_end = copies + bytes;
    if (bytes && ftw("/data", copy_one, 16) != 0)
        die("/data");
}

struct record {
    uint64_t size, next, type;
    uint32_t id, flags;
    uint64_t time;
    char name[16];
    uint64_t hash;
};

/* A heap of small objects: sizes, pointers, counters, times, short names. */
static void fill_records(size_t bytes)
{
    struct record *records = (struct record *)room(bytes);
    size_t count = bytes / sizeof *records;
    uint64_t base = 0x7f0000000000ULL + below(1 << 30) * PAGE, types = 0x555500000000ULL + below(1 << 20) * PAGE;
    uint64_t time = 1763720000000000ULL;
    for (size_t n = 0; n < count; n++) {
        struct record *one = &records[n];
        time += below(5000);
        one->size = sizeof *one | 1;
        one->next = base + below(count) * sizeof *one;
        one->type = types + below(24) * 64;
        one->id = (uint32_t)n;
        one->flags = 1U << below(6);
        one->time = time;
        snprintf(one->name, sizeof one->name, "item-%u", (unsigned)below(1000000));
        one->hash = draw();
    }
}

static const char *const WORDS[] = {
    "accepted", "address", "after", "again", "bytes", "cache", "closed", "connection", "delayed", "found", "from",
    "image", "index", "known", "later", "memory", "missing", "opened", "page", "peer", "queue", "read", "refused",
    "request", "retry", "server", "session", "slow", "socket", "stored", "stream", "timeout", "token", "unknown",
    "update", "user", "waiting", "worker", "written", "zone",
};

/* Lines of a log. */
static void fill_text(size_t bytes)
{
    char *text = (char *)room(bytes), line[256];
    uint64_t time = 0;
    for (size_t at = 0; at < bytes;) {
        time += below(20000);
        int length = snprintf(line, sizeof line, "2026-11-21T%02u:%02u:%02u.%06u worker-%u %s", (unsigned)(time / 3600000000 % 24),
                              (unsigned)(time / 60000000 % 60), (unsigned)(time / 1000000 % 60),
                              (unsigned)(time % 1000000), (unsigned)below(32), below(8) ? "INFO" : "WARNING");
        for (uint64_t words = 3 + below(8); words > 0; words--)
            length += snprintf(line + length, sizeof line - length, " %s", WORDS[below(sizeof WORDS / sizeof *WORDS)]);
        length += snprintf(line + length, sizeof line - length, " %llu\n", (unsigned long long)below(10000000));
        size_t wanted = (size_t)length < bytes - at ? (size_t)length : bytes - at;
        memcpy(text + at, line, wanted);
        at += wanted;
    }
}

/* A grid of measurements: neighbors are near one another, the last digits are noise. */
static void fill_numbers(size_t bytes)
{
    double *numbers = (double *)room(bytes), value = 300.0;
    for (size_t n = 0; n < bytes / sizeof *numbers; n++) {
        value += ((double)(int64_t)draw() / 9.3e18 - (value - 300.0) * 0.01) * 0.1;
        numbers[n] = value;
    }
}

/* What is compressed or encrypted already. */
static void fill_random(size_t bytes)
{
    uint64_t *words = (uint64_t *)room(bytes);
    for (size_t n = 0; n < bytes / sizeof *words; n++)
        words[n] = draw();
}

int main(int count, char **arguments)
{
    unsigned long seed, mib[5];
    if (count != 2 || sscanf(arguments[1], "%lu:%lu:%lu:%lu:%lu:%lu", &seed, mib, mib + 1, mib + 2, mib + 3, mib + 4) != 6) {
        fprintf(stderr, "usage: store_filler SEED:COPIES:RECORDS:TEXT:NUMBERS:RANDOM\n");
        return 2;
    }
    void (*const fill[])(size_t) = {fill_copies, fill_records, fill_text, fill_numbers, fill_random};
    clear_free_memory();
    for (unsigned kind = 0; kind < 5; kind++) {
        state = 0x9E3779B97F4A7C15ULL * (seed * 8 + kind + 1);
        fill[kind]((size_t)mib[kind] * MIB);
    }
    printf("GV-FILLED\n");
    fflush(stdout);
    for (;;)
        pause();
}
