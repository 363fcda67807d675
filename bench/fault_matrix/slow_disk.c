/* A slow disk for chosen processes: loaded with LD_PRELOAD, it delays every sync and rename by
   FAULTS_DELAY_MS where the file FAULTS_FOLDER/slow names the process: "redis", or a process id. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
extern char *program_invocation_short_name;

static int is_slow(void) {
    const char *folder = getenv("FAULTS_FOLDER");
    char path[4096], who[32] = "";
    if (!folder) return 0;
    snprintf(path, sizeof path, "%s/slow", folder);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    char *line = fgets(who, sizeof who, file);
    fclose(file);
    if (!line) return 0;
    if (!strncmp(who, "redis", 5)) return !strncmp(program_invocation_short_name, "redis", 5);
    return atoi(who) == getpid();
}

static void wait_if_slow(void) {
    const char *delay_ms = getenv("FAULTS_DELAY_MS");
    if (delay_ms && is_slow()) usleep(atoi(delay_ms) * 1000);
}

#define SLOW(name, parameters, arguments) \
    int name parameters { \
        static int (*real) parameters; \
        if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name); \
        wait_if_slow(); \
        return real arguments; \
    }
SLOW(fsync, (int fd), (fd))
SLOW(fdatasync, (int fd), (fd))
SLOW(rename, (const char *old, const char *new), (old, new))
