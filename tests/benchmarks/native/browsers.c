/* Many browsers in one thread: the load and the publisher of the fan-out benchmarks, at a small part of a server's cost.

     browsers PORT PUBLISH_PORT frames|http shared|own greeted|silent PATHS_FILE

   PATHS_FILE has the path of each connection, one a line (it may hold tokens, which must not be seen in `ps`). `shared`:
   all listen to `bench:0`; `own`: the connection of line N to `bench:N`. `greeted`: a connection is open with its first
   frame, else with the 101. Messages go to PUBLISH_PORT, as frames (see control.py) or as `POST /pub?id=CHANNEL`.

   Commands come on standard input, one a line, and each is answered by one line of JSON. The end of the input ends it.

     open COUNT AT_ONCE                 open so many more connections, AT_ONCE under way at a time
     close COUNT                        drop the oldest ones
     closed SECONDS WINDOW BURST        publish BURST messages whenever there is room for them among WINDOW undelivered
     paced SECONDS RATE                 publish RATE messages a second, whatever becomes of them
     listen MESSAGES SECONDS            `{"listening": true}`, then expect so many from somebody else

   What is counted: events in text frames, by the `"n":` in each, which must grow by one on each connection (in arrays and
   objects alike), and the time since the `"t":` behind it, nanoseconds of CLOCK_MONOTONIC. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { BODY = 200, RECEIVE = 1 << 18, BUCKETS = 64 * 40, EVENTS = 64, RING = 1 << 16 };
enum { STDIN = UINT32_MAX, PUBLISHER = UINT32_MAX - 1, TIMER = UINT32_MAX - 2 };
static const double GRACE = 60, OPENING = 120;

enum state { IDLE, CONNECTING, HANDSHAKE, GREETING, OPEN, GONE };

struct connection {
    int fd;
    enum state state;
    uint32_t last;          /* the last sequence number; 0: none yet */
    uint32_t kept;          /* bytes in `rest` */
    char *rest;             /* the beginning of a frame whose end is still to come */
    const char *path;
};

static struct connection *connections;
static uint32_t lines, opened, oldest, open_now, under_way, to_open, at_once;
static int ep, publisher = -1, timer = -1, port, publish_port, http, own, greeted, spinning;

static enum { NOTHING, OPENING_UP, CLOSED, PACED, LISTENING } command;
static double until, patience;
static uint32_t window, burst;
static uint64_t interval, next_stamp, published, wanted, received, errors, unexpected, lost, refused, complete;
static uint32_t numbers_shared, *numbers, next_channel, *counted;
static uint64_t histogram[BUCKETS], latest;
static double began, cpu_began;

static char *out;
static size_t out_begin, out_end, out_size;

static void fail(const char *what) {
    fprintf(stderr, "browsers: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double seconds(void) { return (double)clock_ns() / 1e9; }

static double own_cpu(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

/* 64 buckets for each doubling of the microseconds: each is 1.6 % wide at most. */
static void note(uint64_t ns) {
    uint64_t us = ns / 1000;
    unsigned place = (unsigned)us;
    if (us >= 128) {
        unsigned shift = 57u - (unsigned)__builtin_clzll(us);
        place = shift * 64 + (unsigned)(us >> shift);
    }
    histogram[place < BUCKETS ? place : BUCKETS - 1]++;
    if (ns > latest) latest = ns;
}

static double quantile(double share) {
    uint64_t total = 0, seen = 0;
    for (unsigned place = 0; place < BUCKETS; place++) total += histogram[place];
    for (unsigned place = 0; place < BUCKETS; place++) {
        seen += histogram[place];
        if (seen && (double)seen >= share * (double)total) {
            unsigned shift = place < 128 ? 0 : place / 64 - 1;
            return (double)((uint64_t)(place - shift * 64) << shift) / 1e3;
        }
    }
    return 0;
}

static void watch(int fd, uint32_t who, uint32_t events, int operation) {
    struct epoll_event event = {.events = events, .data.u32 = who};
    if (epoll_ctl(ep, operation, fd, &event)) fail("epoll_ctl");
}

static int dial(int to, int blocking) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | (blocking ? 0 : SOCK_NONBLOCK), 0);
    if (fd < 0) fail("socket (is the limit of open files too low?)");
    int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)to)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) fail("connect");
    return fd;
}

static void drop(struct connection *one) {
    if (one->state == OPEN) open_now--;
    if (one->state == CONNECTING || one->state == HANDSHAKE || one->state == GREETING) under_way--;
    /* A reset leaves no port waiting, of which 10,000 would soon be all. */
    struct linger now = {.l_onoff = 1, .l_linger = 0};
    setsockopt(one->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(one->fd);
    free(one->rest);
    one->rest = NULL;
    one->kept = 0;
    one->state = GONE;
}

static void open_more(void) {
    while (under_way < at_once && to_open > 0 && opened < lines) {
        struct connection *one = &connections[opened];
        one->fd = dial(port, 0);
        one->state = CONNECTING;
        watch(one->fd, opened, EPOLLOUT, EPOLL_CTL_ADD);
        opened++;
        under_way++;
        to_open--;
    }
}

static void shake(struct connection *one, uint32_t index) {
    char request[9000];
    int error = 0;
    socklen_t length = sizeof error;
    getsockopt(one->fd, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error) {
        refused++;
        drop(one);
        return;
    }
    int size = snprintf(request, sizeof request,
                        "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
                        one->path, port);
    if (send(one->fd, request, (size_t)size, MSG_NOSIGNAL) != size) {
        refused++;
        drop(one);
        return;
    }
    one->state = HANDSHAKE;
    watch(one->fd, index, EPOLLIN, EPOLL_CTL_MOD);
}

static void take_number(struct connection *one, uint32_t n, uint64_t stamp, uint64_t now) {
    if (one->last && n != one->last + 1) errors++;
    one->last = n;
    received++;
    if (now > stamp) note(now - stamp);
    if (own) {
        complete++;
    } else if (++counted[n % RING] >= open_now) {
        counted[n % RING] = 0;
        complete++;
    }
}

static void take_text(struct connection *one, const char *text, size_t length, uint64_t now) {
    const char *end = text + length;
    int found = 0;
    while (text < end && (text = memmem(text, (size_t)(end - text), "\"n\":", 4))) {
        uint32_t n = 0;
        uint64_t stamp = 0;
        for (text += 4; text < end && *text >= '0' && *text <= '9'; text++) n = n * 10 + (uint32_t)(*text - '0');
        if (end - text > 5 && !memcmp(text, ",\"t\":", 5))
            for (text += 5; text < end && *text >= '0' && *text <= '9'; text++)
                stamp = stamp * 10 + (uint64_t)(*text - '0');
        take_number(one, n, stamp, now);
        found = 1;
    }
    if (!found && one->state == OPEN) unexpected++;
}

static void now_open(struct connection *one) {
    one->state = OPEN;
    open_now++;
    under_way--;
}

/* One whole frame; whether the connection lives on. */
static int take_frame(struct connection *one, int first, const char *payload, size_t length, uint64_t now) {
    switch (first) {
    case 0x81:
        if (one->state == GREETING) now_open(one);
        else take_text(one, payload, length, now);
        return 1;
    case 0x89: {
        char pong[6 + 125] = {(char)0x8A, (char)(0x80 | length)};
        memcpy(pong + 6, payload, length);
        return send(one->fd, pong, 6 + length, MSG_NOSIGNAL) == (ssize_t)(6 + length);
    }
    case 0x8A:
        return 1;
    case 0x88:
        return 0;
    default:
        unexpected++;
        return 1;
    }
}

static void receive(struct connection *one) {
    static char buffer[RECEIVE + 1];
    if (one->kept) memcpy(buffer, one->rest, one->kept);
    ssize_t got = recv(one->fd, buffer + one->kept, RECEIVE - one->kept, 0);
    if (got <= 0) {
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        goto gone;
    }
    uint64_t now = clock_ns();
    char *at = buffer, *end = buffer + one->kept + got;
    one->kept = 0;
    if (one->state == HANDSHAKE) {
        char *body = memmem(at, (size_t)(end - at), "\r\n\r\n", 4);
        if (body) {
            *body = 0;
            if (strncmp(at, "HTTP/1.1 101", 12) || !strstr(at, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")) {
                if (!refused) fprintf(stderr, "browsers: refused: %s\n%.500s\n", at, body + 4);
                refused++;
                drop(one);
                return;
            }
            at = body + 4;
            one->state = GREETING;
            if (!greeted) now_open(one);
        }
    }
    while (one->state != HANDSHAKE && end - at >= 2) {
        const unsigned char *head = (unsigned char *)at;
        size_t length = head[1] & 0x7F, size = 2;
        if (length == 126) size = 4;
        if (length == 127) size = 10;
        if ((size_t)(end - at) < size) break;
        if (length == 126) length = (size_t)head[2] << 8 | head[3];
        else if (length == 127) {
            length = 0;
            for (int place = 2; place < 10; place++) length = length << 8 | head[place];
        }
        if ((size_t)(end - at) - size < length) break;
        if (!take_frame(one, head[0], at + size, length, now)) goto gone;
        at += size + length;
    }
    if (at < end) {
        size_t kept = (size_t)(end - at);
        if (kept >= RECEIVE) goto gone;
        one->rest = realloc(one->rest, kept);
        memcpy(one->rest, at, kept);
        one->kept = (uint32_t)kept;
    }
    return;
gone:
    if (one->state == OPEN) lost++;
    else refused++;
    drop(one);
}

static void flush_out(void) {
    while (out_begin < out_end) {
        ssize_t sent = send(publisher, out + out_begin, out_end - out_begin, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno != EAGAIN) fail("publishing");
            watch(publisher, PUBLISHER, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
            return;
        }
        out_begin += (size_t)sent;
    }
    out_begin = out_end = 0;
}

static void put(const void *data, size_t size) {
    if (out_end + size > out_size) {
        memmove(out, out + out_begin, out_end - out_begin);
        out_end -= out_begin;
        out_begin = 0;
        while (out_end + size > out_size) out = realloc(out, out_size = out_size * 2 + (1 << 20));
    }
    memcpy(out + out_end, data, size);
    out_end += size;
}

static void publish(uint64_t stamp) {
    char channel[32], body[BODY + 1], head[256];
    uint32_t number = own ? ++numbers[next_channel] : ++numbers_shared;
    int name = snprintf(channel, sizeof channel, "bench:%u", own ? next_channel : 0);
    int size = snprintf(body, sizeof body, "{\"event_type\":\"bench.tick\",\"channel\":\"%s\",\"data\":{\"n\":%u,\"t\":%llu,"
                        "\"fill\":\"", channel, number, (unsigned long long)stamp);
    memset(body + size, 'x', (size_t)(BODY - 3 - size));
    memcpy(body + BODY - 3, "\"}}", 3);
    if (http) {
        int length = snprintf(head, sizeof head,
                              "POST /pub?id=%s HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n", channel, BODY);
        put(head, (size_t)length);
    } else {
        uint32_t total = htonl((uint32_t)(3 + name + BODY));
        uint16_t length = htons((uint16_t)name);
        memcpy(head, &total, 4);
        head[4] = 'P';
        memcpy(head + 5, &length, 2);
        memcpy(head + 7, channel, (size_t)name);
        put(head, (size_t)(7 + name));
    }
    put(body, BODY);
    if (own && ++next_channel == opened) next_channel = oldest;
    published++;
    wanted += own ? 1 : open_now;
}

static void reset_counts(void) {
    published = wanted = received = errors = unexpected = lost = refused = complete = latest = 0;
    memset(histogram, 0, sizeof histogram);
    memset(counted, 0, RING * sizeof *counted);
    began = seconds();
    cpu_began = own_cpu();
}

static void report(void) {
    double took = seconds() - began;
    printf("{\"deliveries\": %llu, \"published\": %llu, \"missing\": %lld, \"sequence_errors\": %llu, \"lost\": %llu, "
           "\"refused\": %llu, \"unexpected\": %llu, \"open\": %u, \"seconds\": %.6f, \"load_cpu\": %.6f, "
           "\"p50\": %.3f, \"p99\": %.3f, \"max\": %.3f}\n",
           (unsigned long long)received, (unsigned long long)published, (long long)(wanted - received),
           (unsigned long long)errors, (unsigned long long)lost, (unsigned long long)refused,
           (unsigned long long)unexpected, open_now, took, own_cpu() - cpu_began, quantile(0.5), quantile(0.99),
           (double)latest / 1e6);
    fflush(stdout);
    command = NOTHING;
}

static void pace(uint64_t ns) {
    struct itimerspec when = {.it_interval = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)}};
    when.it_value = when.it_interval;
    if (timerfd_settime(timer, 0, &when, NULL)) fail("timerfd_settime");
}

static void obey(const char *line) {
    double time;
    unsigned first, second;
    unsigned long long messages;
    if (sscanf(line, "open %u %u", &first, &second) == 2) {
        reset_counts();
        to_open = first;
        at_once = second;
        patience = began + OPENING;
        command = OPENING_UP;
        open_more();
    } else if (sscanf(line, "close %u", &first) == 1) {
        reset_counts();
        for (; first > 0 && oldest < opened; first--, oldest++)
            if (connections[oldest].state != GONE) drop(&connections[oldest]);
        next_channel = oldest;
        report();
    } else if (sscanf(line, "closed %lf %u %u", &time, &first, &second) == 3) {
        reset_counts();
        window = first;
        burst = second;
        until = began + time;
        patience = until + GRACE;
        command = CLOSED;
    } else if (sscanf(line, "paced %lf %u", &time, &first) == 2) {
        reset_counts();
        interval = 1000000000u / first;
        next_stamp = clock_ns() + interval;
        until = began + time;
        patience = until + GRACE;
        command = PACED;
        pace(interval);
    } else if (sscanf(line, "listen %llu %lf", &messages, &time) == 2) {
        reset_counts();
        wanted = messages * open_now;
        until = began;
        patience = began + time;
        command = LISTENING;
        for (uint32_t index = oldest; index < opened; index++) connections[index].last = 0;
        printf("{\"listening\": true}\n");
        fflush(stdout);
    } else {
        fprintf(stderr, "browsers: not understood: %s\n", line);
        exit(2);
    }
}

static void read_commands(void) {
    static char line[256];
    static size_t length;
    ssize_t got = read(0, line + length, sizeof line - 1 - length);
    if (got <= 0) exit(0);
    length += (size_t)got;
    line[length] = 0;
    char *end = strchr(line, '\n');
    if (end) {
        *end = 0;
        obey(line);
        length = 0;
    }
}

/* What the command at work has to do now; and its end, when that has come. */
static void go_on(void) {
    double now = seconds();
    switch (command) {
    case NOTHING:
        return;
    case OPENING_UP:
        open_more();
        if ((to_open == 0 || opened == lines) && under_way == 0) report();
        else if (now > patience) report();
        return;
    case CLOSED:
        if (now < until && !lost) {
            while (published - complete + burst <= window)
                for (uint32_t count = 0; count < burst; count++) publish(clock_ns());
            flush_out();
            return;
        }
        break;
    case PACED:
        if (now < until && !lost) return;
        pace(0);
        break;
    case LISTENING:
        break;
    }
    if (received >= wanted || now > patience || lost) report();
}

static void tick(void) {
    uint64_t times;
    if (read(timer, &times, sizeof times) != sizeof times || command != PACED) return;
    /* The stamp is the time at which it should have gone: being late is part of the latency. */
    for (; times > 0; times--, next_stamp += interval) publish(next_stamp);
    flush_out();
}

static void read_paths(const char *name) {
    FILE *file = fopen(name, "r");
    char *line = NULL;
    size_t size = 0;
    ssize_t length;
    if (!file) fail(name);
    while ((length = getline(&line, &size, file)) > 0) {
        if (line[length - 1] == '\n') line[length - 1] = 0;
        connections = realloc(connections, (lines + 1) * sizeof *connections);
        connections[lines++] = (struct connection){.path = strdup(line)};
    }
    fclose(file);
}

int main(int count, char **given) {
    if (count != 7) {
        fprintf(stderr, "usage: browsers PORT PUBLISH_PORT frames|http shared|own greeted|silent PATHS_FILE\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    port = atoi(given[1]);
    publish_port = atoi(given[2]);
    http = !strcmp(given[3], "http");
    own = !strcmp(given[4], "own");
    greeted = !strcmp(given[5], "greeted");
    spinning = sysconf(_SC_NPROCESSORS_ONLN) > 1;
    read_paths(given[6]);
    numbers = calloc(lines + 1, sizeof *numbers);
    counted = calloc(RING, sizeof *counted);
    ep = epoll_create1(EPOLL_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    watch(timer, TIMER, EPOLLIN, EPOLL_CTL_ADD);
    watch(0, STDIN, EPOLLIN, EPOLL_CTL_ADD);
    if (publish_port) {
        publisher = dial(publish_port, 1);
        watch(publisher, PUBLISHER, EPOLLIN, EPOLL_CTL_ADD);
    }
    for (;;) {
        struct epoll_event ready[EVENTS];
        /* Publishing, it never sleeps: browsers are elsewhere, and no server should pay for waking them, the slower ones
           more often. */
        int patient = command == NOTHING ? -1 : spinning && (command == CLOSED || command == PACED) ? 0 : 100;
        int many = epoll_wait(ep, ready, EVENTS, patient);
        for (int place = 0; place < many; place++) {
            uint32_t who = ready[place].data.u32;
            if (who == STDIN) read_commands();
            else if (who == TIMER) tick();
            else if (who == PUBLISHER) {
                static char answers[1 << 16];
                if (ready[place].events & EPOLLOUT) {
                    watch(publisher, PUBLISHER, EPOLLIN, EPOLL_CTL_MOD);
                    flush_out();
                }
                if (ready[place].events & EPOLLIN && recv(publisher, answers, sizeof answers, MSG_DONTWAIT) == 0) {
                    fprintf(stderr, "browsers: the server takes no messages any more\n");
                    return 1;
                }
            } else if (connections[who].state == CONNECTING) shake(&connections[who], who);
            else if (connections[who].state != GONE) receive(&connections[who]);
        }
        go_on();
    }
}
