/*
 * Causality, watched from inside a slice.
 *
 * Theory of operation.  Every VM runs one copy of this program.
 *
 * Datagrams: each VM sends UDP datagrams to all others in turn; those from one sender to one receiver are numbered
 * 0, 1, 2, ...  A receiver remembers, for each sender, every number that it ever saw.  In a live network a number comes
 * once.  Suppose a snapshot is inconsistent: the receiver's image has seen number k, and the sender's image was taken
 * before it sent k (an orphan: received, never sent).  After a restore the sender goes on from its image, sends k
 * again, and the receiver sees k a second time.  So udp_duplicates counts the orphans of the snapshots that this slice
 * was restored from, and stays 0 for ever when they were consistent.  Numbers never seen were lost; numbers below the
 * highest seen came out of order.
 *
 * Tokens: each VM starts with some tokens, and each pair of VMs moves them to and fro over one TCP connection, which is
 * opened once and never again: one that ends is counted as dead.  Messages have a fixed size, a number, the tokens they
 * move and the sum of tokens moved so far in that direction.  A receiver checks number and sum.  An orphan in TCP is
 * bytes that the receiver's kernel has acknowledged and the sender's has not sent: after a restore the resent bytes are
 * dropped as old, so that the two sides disagree on what was moved.  The sizes of moves are drawn from the clock as
 * well, so a second life does not repeat the first, and the sums tell.  From outside, at any time:
 *   - of each VM, balance = start - all tokens_sent + all tokens_received;
 *   - of each direction, tokens_received at one end never exceeds tokens_sent at the other (seen at the same time or
 *     later); what is missing is in flight.
 *
 * The end: quiesce_after seconds after the guest's boot (its own monotonic clock, which its image carries) a VM stops
 * sending datagrams and tokens, and says LAST on each connection, with the number of datagrams it has sent there.
 * When a VM has said and heard LAST everywhere, nothing is in flight to it but datagrams: it waits one second for those
 * and prints GV-FINAL.  The balances of all VMs' GV-FINAL lines sum up to what all started with.  Of a connection that is
 * dead no LAST is awaited.
 *
 * Of each pair, the VM with the lower index connects and the other listens; both know one another by address.
 * One thread, one epoll; nothing here waits with a time limit.
 *
 * Use: causality vm=NAME index=N address=ADDRESS peers=ADDRESS,ADDRESS,...   (all VMs, in order of index, from 1)
 *                [rate=DATAGRAMS PER SECOND, 0 to 20000] [moves=TOKEN MOVES PER SECOND, 0 to 5000] [tokens=AT THE START]
 *                [quiesce_after=SECONDS]                                          unknown names are ignored
 * Once a second it prints
 *   GV-STAT {"vm": "n1", "index": 1, "t_ms": ..., "udp_sent": ..., ..., "tokens_sent": {"2": ..., "3": ...}, ...}
 * with peers by their index, and all counts since the start.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { UDP_PORT = 7001, TCP_PORT = 7002, MAX_VMS = 32, DATAGRAM_MAGIC = 0x47564447, MESSAGE_MAGIC = 0x47564d53 };
enum { TICK_MS = 10, MOST_TICKS_AT_ONCE = 20, RECONNECT_MS = 200, REPORT_MS = 1000, DRAIN_MS = 1000 };
enum { LARGEST_MOVE = 9, RECEIVE_BUFFER = 8 << 20, DATAGRAM_PADDING = 64 };

/* Datagrams of one sender to one receiver: as many as there are bits to remember them (2 MiB, touched as needed). */
#define MOST_NUMBERS (UINT64_C(1) << 24)

enum kind { MOVE = 1, LAST = 2 };
enum connection { UNCONNECTED, CONNECTING, ESTABLISHED, DEAD };
enum phase { TRAFFIC, QUIESCING, DRAINING, FINAL };

struct datagram {
    uint32_t magic;
    uint32_t sender;
    uint64_t number;
    uint8_t padding[DATAGRAM_PADDING];
};

struct message {
    uint32_t magic;
    uint16_t kind;
    uint16_t tokens;
    uint64_t number;
    uint64_t total;     /* tokens moved in this direction, this message included */
    uint64_t datagrams; /* LAST: how many were sent to the receiver */
};

struct peer {
    int index;
    struct in_addr address;

    uint64_t udp_sent;
    uint64_t udp_highest; /* highest number seen, plus 1 */
    uint64_t udp_distinct;
    uint64_t udp_duplicates;
    uint64_t udp_reordered;
    uint64_t udp_expected; /* from LAST: how many there were */
    uint8_t *udp_seen;

    enum connection connection;
    int socket;
    uint64_t retry_at;
    uint64_t messages_sent;
    uint64_t messages_received;
    uint64_t tokens_sent;
    uint64_t tokens_received;
    struct message outgoing;
    size_t outgoing_left;
    struct message incoming;
    size_t incoming_have;
    bool last_sent;
    bool last_received;
};

static const char *vm = "guest";
static int own_index;
static struct in_addr own_address;
static struct peer peers[MAX_VMS];
static int peer_count;
static uint64_t rate = 600, moves = 60, start_tokens = 1000, quiesce_after;

static uint64_t balance;
static uint64_t udp_foreign;
static uint64_t tcp_violations;
static uint64_t random_state;
static enum phase phase;
static uint64_t drain_until;
static int poll_set, udp_socket, listener, ticker;

/* --- small tools ------------------------------------------------------------------------------------------------- */

static void die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fputs("causality: ", stdout);
    vprintf(format, arguments);
    putchar('\n');
    va_end(arguments);
    exit(2);
}

static uint64_t nanoseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static uint64_t milliseconds(void) { return nanoseconds() / 1000000; }

/* xorshift64*, stirred with the clock: a restored VM draws other numbers than it did in its first life. */
static uint64_t draw(uint64_t limit)
{
    random_state ^= nanoseconds() | 1;
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (random_state * UINT64_C(2685821657736338717) >> 32) % limit;
}

static struct sockaddr_in endpoint(struct in_addr address, int port)
{
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = address, .sin_port = htons(port)};
}

static struct peer *peer_by_index(uint32_t index)
{
    for (struct peer *peer = peers; peer < peers + peer_count; peer++)
        if ((uint32_t)peer->index == index)
            return peer;
    return NULL;
}

static struct peer *peer_by_address(struct in_addr address)
{
    for (struct peer *peer = peers; peer < peers + peer_count; peer++)
        if (peer->address.s_addr == address.s_addr)
            return peer;
    return NULL;
}

static void watch(int descriptor, uint32_t events, void *what, int operation)
{
    struct epoll_event event = {.events = events, .data.ptr = what};

    if (epoll_ctl(poll_set, operation, descriptor, &event))
        die("epoll: %s", strerror(errno));
}

/* A named counter of a file like /proc/net/snmp, with a line of names and then a line of values for each protocol. */
static uint64_t kernel_counter(const char *path, const char *protocol, const char *name)
{
    char names[8192], values[8192], *more_names, *more_values;
    uint64_t found = 0;
    FILE *file = fopen(path, "r");

    while (file && fgets(names, sizeof names, file) && fgets(values, sizeof values, file)) {
        char *key = strtok_r(names, " \n", &more_names), *value = strtok_r(values, " \n", &more_values);

        if (!key || strcmp(key, protocol))
            continue;
        while (key && value && strcmp(key, name)) {
            key = strtok_r(NULL, " \n", &more_names);
            value = strtok_r(NULL, " \n", &more_values);
        }
        found = key && value ? strtoull(value, NULL, 10) : 0;
    }
    if (file)
        fclose(file);
    return found;
}

/* --- datagrams --------------------------------------------------------------------------------------------------- */

static void send_datagram(struct peer *peer)
{
    struct sockaddr_in to = endpoint(peer->address, UDP_PORT);
    struct datagram datagram = {.magic = DATAGRAM_MAGIC, .sender = own_index, .number = peer->udp_sent};

    if (peer->connection < ESTABLISHED || peer->udp_sent == MOST_NUMBERS)
        return; /* a peer that has not booted would count the first ones as lost */
    if (sendto(udp_socket, &datagram, sizeof datagram, 0, (struct sockaddr *)&to, sizeof to) == sizeof datagram)
        peer->udp_sent++;
}

static void send_datagrams(uint64_t ticks)
{
    static uint64_t owed, next;

    owed += rate * ticks * TICK_MS;
    for (; owed >= 1000; owed -= 1000)
        send_datagram(&peers[next++ % peer_count]);
}

static void note_number(struct peer *peer, uint64_t number)
{
    uint8_t bit = 1 << (number % 8);

    if (peer->udp_seen[number / 8] & bit) {
        peer->udp_duplicates++;
        return;
    }
    peer->udp_seen[number / 8] |= bit;
    peer->udp_distinct++;
    if (number < peer->udp_highest)
        peer->udp_reordered++;
    else
        peer->udp_highest = number + 1;
}

static void receive_datagrams(void)
{
    struct datagram datagram;
    ssize_t length;

    while ((length = recv(udp_socket, &datagram, sizeof datagram, 0)) >= 0) {
        struct peer *peer = length == sizeof datagram ? peer_by_index(datagram.sender) : NULL;

        if (peer && datagram.magic == DATAGRAM_MAGIC && datagram.number < MOST_NUMBERS)
            note_number(peer, datagram.number);
        else
            udp_foreign++;
    }
}

static uint64_t datagrams_lost(const struct peer *peer)
{
    uint64_t known = peer->udp_expected > peer->udp_highest ? peer->udp_expected : peer->udp_highest;

    return known - peer->udp_distinct;
}

/* --- connections ------------------------------------------------------------------------------------------------- */

static void connection_died(struct peer *peer)
{
    close(peer->socket);
    peer->connection = DEAD;
    printf("GV-DEAD {\"vm\": \"%s\", \"peer\": %d, \"error\": \"%s\"}\n", vm, peer->index,
           errno ? strerror(errno) : "closed by the peer");
    fflush(stdout);
}

static void connection_is_open(struct peer *peer, int descriptor, int operation)
{
    int on = 1;

    setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    peer->socket = descriptor;
    peer->connection = ESTABLISHED;
    watch(descriptor, EPOLLIN | EPOLLOUT | EPOLLET, peer, operation);
}

static int tcp_socket(struct in_addr address, int port)
{
    int on = 1, descriptor = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in own = endpoint(address, port);

    if (descriptor < 0)
        die("cannot make a TCP socket: %s", strerror(errno));
    setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(descriptor, (struct sockaddr *)&own, sizeof own))
        die("cannot bind TCP port %d of %s: %s", port, inet_ntoa(address), strerror(errno));
    return descriptor;
}

/* Until a peer has booted, connecting fails; that is no connection yet, so none has died. */
static void connect_later(struct peer *peer, int descriptor)
{
    close(descriptor);
    peer->connection = UNCONNECTED;
    peer->retry_at = milliseconds() + RECONNECT_MS;
}

static void start_connecting(struct peer *peer)
{
    struct sockaddr_in to = endpoint(peer->address, TCP_PORT);
    int descriptor = tcp_socket(own_address, 0);

    if (connect(descriptor, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) {
        connect_later(peer, descriptor);
        return;
    }
    peer->socket = descriptor;
    peer->connection = CONNECTING;
    watch(descriptor, EPOLLOUT, peer, EPOLL_CTL_ADD);
}

static void finish_connecting(struct peer *peer)
{
    int error = 0;
    socklen_t length = sizeof error;

    getsockopt(peer->socket, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error)
        connect_later(peer, peer->socket);
    else
        connection_is_open(peer, peer->socket, EPOLL_CTL_MOD);
}

static void accept_connections(void)
{
    struct sockaddr_in from;
    socklen_t length = sizeof from;
    int descriptor;

    while ((descriptor = accept4(listener, (struct sockaddr *)&from, &length, SOCK_NONBLOCK)) >= 0) {
        struct peer *peer = peer_by_address(from.sin_addr);

        if (peer && peer->connection == UNCONNECTED) {
            connection_is_open(peer, descriptor, EPOLL_CTL_ADD);
        } else { /* a second connection of one pair: somebody's first has gone */
            tcp_violations++;
            close(descriptor);
        }
    }
}

static void connect_peers(uint64_t now)
{
    for (struct peer *peer = peers; peer < peers + peer_count; peer++)
        if (own_index < peer->index && peer->connection == UNCONNECTED && now >= peer->retry_at)
            start_connecting(peer);
}

/* --- tokens ------------------------------------------------------------------------------------------------------ */

static void flush_message(struct peer *peer)
{
    while (peer->connection == ESTABLISHED && peer->outgoing_left) {
        const char *rest = (const char *)(&peer->outgoing + 1) - peer->outgoing_left;
        ssize_t sent = send(peer->socket, rest, peer->outgoing_left, MSG_NOSIGNAL);

        if (sent < 0 && errno == EAGAIN)
            return;
        if (sent < 0)
            connection_died(peer);
        else
            peer->outgoing_left -= sent;
    }
}

static void send_message(struct peer *peer, enum kind kind, uint16_t tokens)
{
    peer->tokens_sent += tokens;
    balance -= tokens;
    peer->outgoing = (struct message){
        .magic = MESSAGE_MAGIC,
        .kind = kind,
        .tokens = tokens,
        .number = peer->messages_sent++,
        .total = peer->tokens_sent,
        .datagrams = peer->udp_sent,
    };
    peer->outgoing_left = sizeof peer->outgoing;
    flush_message(peer);
}

static void move_tokens(struct peer *peer)
{
    uint64_t most = balance < LARGEST_MOVE ? balance : LARGEST_MOVE;

    if (peer->connection == ESTABLISHED && !peer->outgoing_left && most)
        send_message(peer, MOVE, 1 + draw(most));
}

static void move_some_tokens(uint64_t ticks)
{
    static uint64_t owed;

    owed += moves * ticks * TICK_MS;
    for (; owed >= 1000; owed -= 1000)
        move_tokens(&peers[draw(peer_count)]);
}

static void take_message(struct peer *peer)
{
    const struct message *message = &peer->incoming;

    peer->tokens_received += message->tokens;
    balance += message->tokens;
    if (message->magic != MESSAGE_MAGIC || message->number != peer->messages_received || peer->last_received ||
        message->total != peer->tokens_received)
        tcp_violations++;
    peer->messages_received++;
    if (message->kind == LAST) {
        peer->last_received = true;
        peer->udp_expected = message->datagrams;
    }
}

static void receive_messages(struct peer *peer)
{
    while (peer->connection == ESTABLISHED) {
        char *rest = (char *)&peer->incoming + peer->incoming_have;
        ssize_t length = recv(peer->socket, rest, sizeof peer->incoming - peer->incoming_have, 0);

        if (length < 0 && errno == EAGAIN)
            return;
        if (length <= 0) {
            errno = length ? errno : 0;
            connection_died(peer);
            return;
        }
        peer->incoming_have += length;
        if (peer->incoming_have == sizeof peer->incoming) {
            peer->incoming_have = 0;
            take_message(peer);
        }
    }
}

/* --- the console ------------------------------------------------------------------------------------------------- */

static void print_tokens(FILE *line, const char *name, bool sent)
{
    fprintf(line, ", \"%s\": {", name);
    for (struct peer *peer = peers; peer < peers + peer_count; peer++)
        fprintf(line, "%s\"%d\": %lu", peer == peers ? "" : ", ", peer->index,
                sent ? peer->tokens_sent : peer->tokens_received);
    fputs("}", line);
}

static void print_datagrams(FILE *line)
{
    struct peer sum = {0};
    uint64_t lost = 0;
    bool exhausted = false;

    for (struct peer *peer = peers; peer < peers + peer_count; peer++) {
        sum.udp_sent += peer->udp_sent;
        sum.udp_distinct += peer->udp_distinct;
        sum.udp_duplicates += peer->udp_duplicates;
        sum.udp_reordered += peer->udp_reordered;
        lost += datagrams_lost(peer);
        exhausted |= peer->udp_sent == MOST_NUMBERS;
    }
    fprintf(line, ", \"udp_sent\": %lu, \"udp_received\": %lu, \"udp_duplicates\": %lu", sum.udp_sent,
            sum.udp_distinct + sum.udp_duplicates, sum.udp_duplicates);
    fprintf(line, ", \"udp_lost\": %lu, \"udp_reordered\": %lu, \"udp_foreign\": %lu", lost, sum.udp_reordered,
            udp_foreign);
    fprintf(line, ", \"udp_exhausted\": %s, \"udp_buffer_errors\": %lu", exhausted ? "true" : "false",
            kernel_counter("/proc/net/snmp", "Udp:", "RcvbufErrors"));
}

static void print_connections(FILE *line)
{
    int established = 0, dead = 0;

    for (struct peer *peer = peers; peer < peers + peer_count; peer++) {
        established += peer->connection == ESTABLISHED;
        dead += peer->connection == DEAD;
    }
    fprintf(line, ", \"tcp_established\": %d, \"tcp_dead\": %d, \"tcp_violations\": %lu", established, dead,
            tcp_violations);
    fprintf(line, ", \"tcp_retrans_segs\": %lu", kernel_counter("/proc/net/snmp", "Tcp:", "RetransSegs"));
    /* Of these: probes for a tail that is merely late (RFC 8985), and timeouts, which alone slow a connection down. */
    fprintf(line, ", \"tcp_loss_probes\": %lu", kernel_counter("/proc/net/netstat", "TcpExt:", "TCPLossProbes"));
    fprintf(line, ", \"tcp_timeouts\": %lu", kernel_counter("/proc/net/netstat", "TcpExt:", "TCPTimeouts"));
}

/* One line in one write, so that no other line of the console's comes between. */
static void report(const char *title)
{
    static const char *const phases[] = {"traffic", "quiescing", "draining", "final"};
    char text[4096];
    FILE *line = fmemopen(text, sizeof text, "w");

    fprintf(line, "%s {\"vm\": \"%s\", \"index\": %d, \"t_ms\": %lu", title, vm, own_index, milliseconds());
    fprintf(line, ", \"phase\": \"%s\"", phases[phase]);
    print_datagrams(line);
    print_connections(line);
    fprintf(line, ", \"start_tokens\": %lu, \"balance\": %lu", start_tokens, balance);
    print_tokens(line, "tokens_sent", true);
    print_tokens(line, "tokens_received", false);
    fputs("}\n", line);
    fclose(line);
    fputs(text, stdout);
    fflush(stdout);
}

/* --- the end ----------------------------------------------------------------------------------------------------- */

static bool all_said_last(void)
{
    bool all = true;

    for (struct peer *peer = peers; peer < peers + peer_count; peer++) {
        if (peer->connection == ESTABLISHED && !peer->outgoing_left && !peer->last_sent) {
            peer->last_sent = true;
            send_message(peer, LAST, 0);
        }
        all &= peer->connection == DEAD || (peer->last_sent && !peer->outgoing_left && peer->last_received);
    }
    return all;
}

static void advance_phase(uint64_t now)
{
    if (phase == TRAFFIC && quiesce_after && now >= quiesce_after * 1000)
        phase = QUIESCING;
    if (phase == QUIESCING && all_said_last()) {
        phase = DRAINING;
        drain_until = now + DRAIN_MS;
    }
    if (phase == DRAINING && now >= drain_until) {
        phase = FINAL;
        report("GV-FINAL");
    }
}

/* --- the loop ---------------------------------------------------------------------------------------------------- */

/* After a long pause the timer owes many ticks; making good on all of them would be a flood. */
static void tick(void)
{
    static uint64_t report_at;
    uint64_t ticks = 0, now = milliseconds();

    if (read(ticker, &ticks, sizeof ticks) != sizeof ticks)
        return;
    ticks = ticks < MOST_TICKS_AT_ONCE ? ticks : MOST_TICKS_AT_ONCE;
    connect_peers(now);
    if (phase == TRAFFIC) {
        send_datagrams(ticks);
        move_some_tokens(ticks);
    }
    advance_phase(now);
    if (now >= report_at) {
        report("GV-STAT");
        report_at = now + REPORT_MS;
    }
}

static void serve_peer(struct peer *peer)
{
    if (peer->connection == CONNECTING)
        finish_connecting(peer);
    flush_message(peer);
    receive_messages(peer);
}

static void dispatch(void *what)
{
    if (what == &ticker)
        tick();
    else if (what == &udp_socket)
        receive_datagrams();
    else if (what == &listener)
        accept_connections();
    else
        serve_peer(what);
}

static void run(void)
{
    struct epoll_event events[16];

    for (;;) {
        int count = epoll_wait(poll_set, events, 16, -1);

        for (int i = 0; i < count; i++)
            dispatch(events[i].data.ptr);
    }
}

/* --- the start --------------------------------------------------------------------------------------------------- */

static void open_udp(void)
{
    struct sockaddr_in own = endpoint(own_address, UDP_PORT);
    int size = RECEIVE_BUFFER;

    udp_socket = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    setsockopt(udp_socket, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (bind(udp_socket, (struct sockaddr *)&own, sizeof own))
        die("cannot bind UDP port %d of %s: %s", UDP_PORT, inet_ntoa(own_address), strerror(errno));
    watch(udp_socket, EPOLLIN, &udp_socket, EPOLL_CTL_ADD);
}

static void open_listener(void)
{
    listener = tcp_socket(own_address, TCP_PORT);
    if (listen(listener, MAX_VMS))
        die("cannot listen on TCP port %d: %s", TCP_PORT, strerror(errno));
    watch(listener, EPOLLIN, &listener, EPOLL_CTL_ADD);
}

static void open_ticker(void)
{
    const struct timespec period = {.tv_nsec = TICK_MS * 1000000};
    const struct itimerspec timer = {.it_interval = period, .it_value = period};

    ticker = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    if (ticker < 0 || timerfd_settime(ticker, 0, &timer, NULL))
        die("cannot make a timer: %s", strerror(errno));
    watch(ticker, EPOLLIN, &ticker, EPOLL_CTL_ADD);
}

static struct in_addr parse_address(const char *text)
{
    struct in_addr address;

    if (!inet_aton(text, &address))
        die("'%s' is not an IPv4 address", text);
    return address;
}

static uint64_t parse_number(const char *name, const char *text, uint64_t most)
{
    char *end;
    uint64_t value = strtoull(text, &end, 10);

    if (!*text || *end || value > most)
        die("%s=%s: expected a whole number from 0 to %lu", name, text, most);
    return value;
}

/* The list names all VMs in order of their index, this one too. */
static void parse_peers(char *list)
{
    int index = 0;

    for (char *text = strtok(list, ","); text; text = strtok(NULL, ",")) {
        struct peer *peer = &peers[peer_count];

        if (++index == own_index)
            continue;
        if (peer_count == MAX_VMS)
            die("more than %d VMs in peers=", MAX_VMS);
        peer->index = index;
        peer->address = parse_address(text);
        peer->udp_seen = calloc(1, MOST_NUMBERS / 8);
        if (!peer->udp_seen)
            die("no memory for %d peers", index);
        peer_count++;
    }
}

static void parse_word(const char *name, char *value, char **list)
{
    if (!strcmp(name, "vm"))
        vm = value;
    else if (!strcmp(name, "index"))
        own_index = parse_number(name, value, MAX_VMS);
    else if (!strcmp(name, "address"))
        own_address = parse_address(value);
    else if (!strcmp(name, "peers"))
        *list = value;
    else if (!strcmp(name, "rate"))
        rate = parse_number(name, value, 20000);
    else if (!strcmp(name, "moves"))
        moves = parse_number(name, value, 5000);
    else if (!strcmp(name, "tokens"))
        start_tokens = parse_number(name, value, 1000000000);
    else if (!strcmp(name, "quiesce_after"))
        quiesce_after = parse_number(name, value, 1000000000);
}

static void parse(int count, char **words)
{
    char *list = NULL;

    for (int i = 1; i < count; i++) {
        char *equals = strchr(words[i], '=');

        if (!equals)
            die("'%s': expected NAME=VALUE", words[i]);
        *equals = 0;
        parse_word(words[i], equals + 1, &list);
    }
    if (!own_index || !own_address.s_addr || !list)
        die("expected at least index=, address= and peers=");
    parse_peers(list);
    if (!peer_count)
        die("peers= names no other VM");
}

int main(int count, char **words)
{
    parse(count, words);
    balance = start_tokens;
    poll_set = epoll_create1(0);
    open_udp();
    open_listener();
    open_ticker();
    run();
    return 0;
}
