/* A job that says when its main began, before anything else: started FIFO TAG [stay]
 *
 * Writes "TAG NANOSECONDS" (CLOCK_MONOTONIC) to the FIFO in one atomic piece. With a third argument it then
 * waits for a signal, and SIGTERM ends it at once, as it ends every program that does not handle it.
 */
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (argc < 3)
        return 2;
    char line[256];
    int length = snprintf(line, sizeof line, "%s %lld\n", argv[2], now.tv_sec * 1000000000LL + now.tv_nsec);
    int fd = open(argv[1], O_WRONLY);
    if (fd < 0 || length >= (int)sizeof line || write(fd, line, length) != length)
        return 1;
    close(fd);
    if (argc > 3)
        pause();
    return 0;
}
