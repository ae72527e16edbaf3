/* The least that a WebSocket server can do: the handshake, then ready frames to whoever listens to their channel.

     floor PORT CONTROL_PORT plain|join

   `plain` writes each message to each connection by itself; `join` first puts together what one look at the sockets has
   brought for a channel. Nothing is checked, nothing that clients send is looked at. The key of the handshake must be the
   one of RFC 6455, section 1.3, so that its answer is known. Messages come on CONTROL_PORT as control.py writes them. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EVENTS = 256, TABLE = 1 << 16, NAME = 64, MOST = 1 << 17, RECEIVE = 1 << 18 };
enum kind { LISTENER, CONTROL_LISTENER, CONTROL, HANDSHAKE, BROWSER };

struct connection {
    enum kind kind;
    int fd;
    char *unsent;
    size_t unsent_bytes;
};

struct channel {
    char name[NAME];
    struct connection **listeners;
    uint32_t count, size;
    char *pending;
    size_t pending_bytes, pending_size;
    struct channel *next;
};

static struct channel *table[TABLE], *dirty[MOST];
static uint32_t dirty_count;
static int ep, join;

static void fail(const char *what) {
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static struct channel *find(const char *name, size_t length) {
    uint32_t hash = 2166136261u;
    for (size_t place = 0; place < length; place++) hash = (hash ^ (unsigned char)name[place]) * 16777619u;
    struct channel **at = &table[hash % TABLE];
    for (; *at; at = &(*at)->next)
        if (!memcmp((*at)->name, name, length) && !(*at)->name[length]) return *at;
    *at = calloc(1, sizeof **at);
    memcpy((*at)->name, name, length);
    return *at;
}

static void watch(struct connection *one, uint32_t events, int operation) {
    struct epoll_event event = {.events = events, .data.ptr = one};
    if (epoll_ctl(ep, operation, one->fd, &event)) fail("epoll_ctl");
}

static struct connection *add(int fd, enum kind kind) {
    struct connection *one = calloc(1, sizeof *one);
    one->fd = fd;
    one->kind = kind;
    watch(one, EPOLLIN, EPOLL_CTL_ADD);
    return one;
}

static void listen_on(int port, enum kind kind) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) fail("listen");
    add(fd, kind);
}

static void leave(struct connection *one) {
    close(one->fd);
    if (one->kind == BROWSER)
        for (uint32_t slot = 0; slot < TABLE; slot++)
            for (struct channel *channel = table[slot]; channel; channel = channel->next)
                for (uint32_t place = 0; place < channel->count; place++)
                    if (channel->listeners[place] == one)
                        channel->listeners[place--] = channel->listeners[--channel->count];
    /* An event of this very round may still name it: left to the end of the process. */
    one->fd = -1;
}

static void keep(struct connection *one, const char *data, size_t size) {
    one->unsent = realloc(one->unsent, one->unsent_bytes + size);
    memcpy(one->unsent + one->unsent_bytes, data, size);
    if (!one->unsent_bytes) watch(one, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
    one->unsent_bytes += size;
}

static void write_to(struct connection *one, const char *data, size_t size) {
    if (one->unsent_bytes) {
        keep(one, data, size);
        return;
    }
    ssize_t sent = send(one->fd, data, size, MSG_NOSIGNAL);
    if (sent < 0) sent = errno == EAGAIN ? 0 : (ssize_t)size; /* Lost: reading tells. */
    if ((size_t)sent < size) keep(one, data + sent, size - (size_t)sent);
}

static void write_rest(struct connection *one) {
    ssize_t sent = send(one->fd, one->unsent, one->unsent_bytes, MSG_NOSIGNAL);
    if (sent <= 0) return;
    memmove(one->unsent, one->unsent + sent, one->unsent_bytes - (size_t)sent);
    one->unsent_bytes -= (size_t)sent;
    if (!one->unsent_bytes) watch(one, EPOLLIN, EPOLL_CTL_MOD);
}

static void flush(struct channel *channel) {
    for (uint32_t place = 0; place < channel->count; place++)
        write_to(channel->listeners[place], channel->pending, channel->pending_bytes);
    channel->pending_bytes = 0;
}

static void publish(struct channel *channel, const char *body, size_t size) {
    if (channel->pending_bytes + size + 10 > channel->pending_size)
        channel->pending = realloc(channel->pending, channel->pending_size = channel->pending_size * 2 + size + 10);
    if (join && !channel->pending_bytes) dirty[dirty_count++] = channel;
    unsigned char *frame = (unsigned char *)channel->pending + channel->pending_bytes;
    size_t head = 2;
    frame[0] = 0x81;
    if (size < 126) frame[1] = (unsigned char)size;
    else {
        frame[1] = 126;
        frame[2] = (unsigned char)(size >> 8);
        frame[3] = (unsigned char)size;
        head = 4;
    }
    memcpy(frame + head, body, size);
    channel->pending_bytes += head + size;
    if (!join) flush(channel);
}

static void read_control(struct connection *one) {
    static char buffer[RECEIVE];
    static size_t kept;
    ssize_t got = recv(one->fd, buffer + kept, sizeof buffer - kept, 0);
    if (got <= 0) {
        kept = 0;
        leave(one);
        return;
    }
    size_t at = 0, end = kept + (size_t)got;
    while (end - at >= 4) {
        uint32_t total;
        uint16_t name;
        memcpy(&total, buffer + at, 4);
        total = ntohl(total);
        if (end - at - 4 < total) break;
        memcpy(&name, buffer + at + 5, 2);
        name = ntohs(name);
        publish(find(buffer + at + 7, name), buffer + at + 7 + name, total - 3 - name);
        at += 4 + total;
    }
    memmove(buffer, buffer + at, end - at);
    kept = end - at;
}

/* The request comes in one piece, as browsers.c sends it. */
static void shake(struct connection *one) {
    static char request[1 << 14];
    static const char answer[] =
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    ssize_t got = recv(one->fd, request, sizeof request - 1, 0);
    if (got <= 0) {
        leave(one);
        return;
    }
    request[got] = 0;
    char *names = strstr(request, "channels=");
    for (names = names ? names + 9 : ""; *names && *names != ' ' && *names != '&';) {
        size_t length = strcspn(names, ", &");
        struct channel *channel = find(names, length < NAME ? length : NAME - 1);
        if (channel->count == channel->size)
            channel->listeners = realloc(channel->listeners, (channel->size = channel->size * 2 + 1) * sizeof one);
        channel->listeners[channel->count++] = one;
        names += length + (names[length] == ',');
    }
    one->kind = BROWSER;
    write_to(one, answer, sizeof answer - 1);
}

static void take_in(int listener, enum kind kind) {
    int fd, yes = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        add(fd, kind);
    }
    if (errno != EAGAIN && errno != ECONNABORTED) fail("accept");
}

int main(int count, char **given) {
    if (count != 4) {
        fprintf(stderr, "usage: floor PORT CONTROL_PORT plain|join\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    join = !strcmp(given[3], "join");
    ep = epoll_create1(EPOLL_CLOEXEC);
    listen_on(atoi(given[1]), LISTENER);
    listen_on(atoi(given[2]), CONTROL_LISTENER);
    for (;;) {
        struct epoll_event ready[EVENTS];
        int many = epoll_wait(ep, ready, EVENTS, -1);
        for (int place = 0; place < many; place++) {
            struct connection *one = ready[place].data.ptr;
            if (one->fd < 0) continue;
            if (ready[place].events & EPOLLOUT) write_rest(one);
            if (!(ready[place].events & ~EPOLLOUT)) continue;
            if (one->kind == LISTENER) take_in(one->fd, HANDSHAKE);
            else if (one->kind == CONTROL_LISTENER) take_in(one->fd, CONTROL);
            else if (one->kind == CONTROL) read_control(one);
            else if (one->kind == HANDSHAKE) shake(one);
            else {
                static char ignored[1 << 16];
                if (recv(one->fd, ignored, sizeof ignored, 0) == 0 || ready[place].events & (EPOLLERR | EPOLLHUP))
                    leave(one);
            }
        }
        for (uint32_t place = 0; place < dirty_count; place++) flush(dirty[place]);
        dirty_count = 0;
    }
}
