/* An audit library of the dynamic linker (LD_AUDIT, see ld.so(8)) for tools/avx2_only.py: libraries that ask the
 * processor what it can do are told of AVX2 and nothing newer. Preloaded (LD_PRELOAD) into a program that was started
 * without LD_AUDIT, it starts that program again with it.
 *
 * Before a library named in the file AVX2_ONLY_PLACES runs its first instruction, its `cpuid` instructions become `int3`
 * and `nop`, together as long. The signal that `int3` raises is answered here: with what `cpuid` says, less the newer
 * instructions. (Not `ud2`: Python's faulthandler, which workers switch on, takes its SIGILL.)
 */

#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

static const unsigned char CPUID[2] = {0x0f, 0xa2}, INT3_NOP[2] = {0xcc, 0x90};

static unsigned bits(const int *numbers, int count) {
    unsigned result = 0;
    for (int i = 0; i < count; i++) result |= 1u << numbers[i];
    return result;
}
#define WITHOUT(register, ...) register &= ~bits((const int[]){__VA_ARGS__}, sizeof((int[]){__VA_ARGS__}) / sizeof(int))

static void answer(int number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    if (memcmp((void *)(registers[REG_RIP] - 1), INT3_NOP, 2)) { /* some other breakpoint; it stands behind it */
        signal(number, SIG_DFL);
        raise(number);
        return;
    }
    unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, subleaf, a, b, c, d);
    if (leaf == 7 && subleaf == 0) {
        WITHOUT(b, 16, 17, 21, 26, 27, 28, 30, 31); /* AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL */
        WITHOUT(c, 1, 6, 11, 12, 14);               /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
        WITHOUT(d, 2, 3, 8, 22, 23, 24, 25);        /* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, FP16, AMX-TILE, AMX-INT8 */
    } else if (leaf == 7 && subleaf == 1) {
        WITHOUT(a, 4, 5, 21, 23);    /* AVX-VNNI, AVX-512 BF16, AMX-FP16, AVX-IFMA */
        WITHOUT(d, 4, 5, 8, 10, 19); /* AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10 */
    } else if (leaf == 0x19 || leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
        a = b = c = d = 0; /* key locker, AMX's tiles and products, AVX10 */
    }
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 1;
}

unsigned la_version(unsigned version) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGTRAP, &action, NULL);
    return version;
}

unsigned la_objopen(struct link_map *map, Lmid_t space, uintptr_t *cookie) {
    (void)space, (void)cookie;
    const char *name = getenv("AVX2_ONLY_PLACES");
    char *path = name ? realpath(map->l_name, NULL) : NULL;
    FILE *places = path ? fopen(name, "r") : NULL;
    char line[4096 + 32];
    while (places && fgets(line, sizeof line, places)) { /* "ADDRESS PATH" */
        char *file;
        unsigned long address = strtoul(line, &file, 16);
        file[strcspn(file, "\n")] = 0;
        if (strcmp(file + 1, path)) continue;
        unsigned char *place = (unsigned char *)map->l_addr + address;
        void *page = (void *)((uintptr_t)place & ~4095ul);
        if (memcmp(place, CPUID, 2) || mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC)) {
            fprintf(stderr, "avx2_only: no cpuid at %lx of %s, or it cannot be replaced\n", address, path);
            abort();
        }
        memcpy(place, INT3_NOP, 2);
        mprotect(page, 8192, PROT_READ | PROT_EXEC);
    }
    if (places) fclose(places);
    free(path);
    return 0;
}

/* kdb-fast's workers are started with a short list of variables: LD_PRELOAD is one, LD_AUDIT is not. */
__attribute__((constructor)) static void audit_too(int count, char **arguments) {
    (void)count;
    Dl_info self;
    char places[4096];
    if (getenv("LD_AUDIT") || !dladdr((void *)audit_too, &self)) return;
    int directory = (int)(strrchr(self.dli_fname, '/') - self.dli_fname);
    snprintf(places, sizeof places, "%.*s/places", directory, self.dli_fname);
    setenv("AVX2_ONLY_PLACES", places, 1);
    setenv("LD_AUDIT", self.dli_fname, 1);
    execv("/proc/self/exe", arguments);
}
