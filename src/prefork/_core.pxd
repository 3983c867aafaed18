# The C API as Cython sees it: prefork.h section by section, and the classes that other
# extension modules may cimport.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "prefork.h" nogil:
    # ---- Errors ----
    cdef enum:
        PF_ERR_APP_FIELD_VALUE
        PF_ERR_APP_HOP_BY_HOP
        PF_ERR_APP_BODY_LONG
        PF_ERR_APP_BODY_SHORT
        PF_ERR_CLOSED
        PF_ERR_WEBSOCKET_KEY
        PF_ERR_WEBSOCKET_VERSION
        PF_ERR_WRITE_TIMEOUT
        PF_ERR_IDLE_TIMEOUT
        PF_ERR_PROXY
        PF_ERR_TLS_CERTIFICATE
        PF_ERR_TLS_VERSION

    const char *pf_error_text(int code)
    const char *pf_error_name(int code)
    int pf_error_status(int code)

    # ---- Request heads ----
    ctypedef struct pf_span:
        uint32_t at, len

    cdef enum:
        PF_FIELD_OTHER
        PF_FIELD_HOST
        PF_FIELD_COOKIE
        PF_FIELD_COUNT

    ctypedef struct pf_field:
        uint32_t name_at, value_at, value_len
        uint16_t name_len
        uint8_t id

    cdef enum:
        PF_HEAD_KEEP_ALIVE
        PF_HEAD_CHUNKED
        PF_HEAD_EXPECT
        PF_HEAD_UPGRADE
        PF_HEAD_IS_HEAD
        PF_HEAD_IS_GET
        PF_HEAD_FORWARDED
        PF_HEAD_TRAILERS

    ctypedef struct pf_head:
        pf_span method, target, path, query, authority
        uint64_t content_length
        uint32_t size
        uint16_t nfields
        uint8_t minor, flags, host
        pf_field *fields

    const char *pf_http_field_name(int id)
    uint64_t pf_http_hash(const char *bytes, size_t len)
    int pf_http_find_field(const pf_head *head, const char *data, const char *name,
                           size_t len, int start)
    const char *pf_http_simd()
    int pf_http_set_simd(const char *name)

    # ---- Listeners ----
    cdef enum:
        PF_SOCKET_REUSEPORT
        PF_SOCKET_V6ONLY
        PF_SOCKET_DEFER_ACCEPT
        PF_SOCKET_FAST_OPEN

    ctypedef struct pf_socket_spec:
        int family
        const char *host
        uint16_t port
        int backlog
        int mode
        unsigned flags

    int pf_socket_listen(const pf_socket_spec *spec)
    int pf_socket_check(int fd)
    int pf_socket_quiesce(int fd)

    cdef enum:
        PF_SOCKET_AVOIDED

    int pf_socket_spread(int fd, int members, const int *avoided, int n)

    # ---- Processes ----
    ctypedef struct pf_processes

    cdef enum:
        PF_PROCESS_EXITED
        PF_PROCESS_SIGNALLED
        PF_PROCESS_READABLE
        PF_PROCESS_STATUS_UNKNOWN

    ctypedef struct pf_process_event:
        int kind
        int pid
        int status

    int pf_process_open(pf_processes **out, const int *signals, int n)
    int pf_process_adopt(pf_processes *p, int pid)
    int pf_process_watch(pf_processes *p, int fd)
    int pf_process_unwatch(pf_processes *p, int fd)
    int pf_process_wait(pf_processes *p, pf_process_event *events, int max,
                        int timeout_ms)
    int pf_process_kill(pf_processes *p, int pid, int signal)
    void pf_process_close(pf_processes *p)
    void pf_process_forget(pf_processes *p)
    int pf_process_set_parent_death_signal(int signal, int expected_parent)
    bint pf_process_is_reaper()
    int pf_process_set_reaper(bint on)
    int pf_process_reap_strangers(pf_processes *p)

    cdef enum:
        PF_PROCESS_FIRST_FD
        PF_PROCESS_FDS

    ctypedef struct pf_process_program:
        const char *path
        char **argv
        char **envp
        const char *directory
        const int *fds
        int nfds

    int pf_process_start(const pf_process_program *program)

    # ---- Files ----
    int pf_files_open()
    int pf_files_watch(int fd, const char *directory)

    # ---- TLS ----
    ctypedef struct pf_tls

    ctypedef struct pf_tls_options:
        int min_version, verify
        const char *ciphers
        const char *ciphersuites
        const char *ca
        size_t ca_len
        bint kernel

    ctypedef struct pf_tls_key:
        const char *cert
        size_t cert_len
        const char *key
        size_t key_len
        const char *password
        const char *staple
        size_t staple_len

    ctypedef struct pf_certificate:
        size_t size
        int64_t not_before, not_after
        char *pem
        char *subject
        char *issuer
        char *serial
        char *names

    ctypedef struct pf_tickets

    ctypedef struct pf_tls_info:
        int version
        uint16_t cipher
        bint resumed
        const char *version_name
        const char *cipher_name
        const char *server_name
        const char *protocol
        size_t protocol_len
        const void *server
        size_t server_len
        const void *client
        size_t client_len

    int pf_tls_open(pf_tls **out, const pf_tls_options *options)
    int pf_tls_add(pf_tls *tls, const pf_tls_key *key)
    const char *pf_tls_reason(const pf_tls *tls)
    void pf_tls_close(pf_tls *tls)
    int pf_tls_describe(const void *der, size_t len, pf_certificate *out)
    void pf_tls_forget(pf_certificate *certificate)
    int pf_tls_certificate(const pf_tls *tls, int place, const void **der, size_t *len)
    int pf_tls_rotate(pf_tickets *tickets)
    void pf_tls_share(pf_tls *tls, pf_tickets *tickets)

    # ---- The scoreboard ----
    ctypedef struct pf_scoreboard

    ctypedef struct pf_loop_stats:
        uint64_t accepted, closed, requests, refused, timeouts, bytes_in, bytes_out
        uint64_t passed_on
        uint64_t *statuses
        uint32_t connections, lent, buffers_in_use

    cdef enum:
        PF_ROW_FREE
        PF_ROW_BOOTING
        PF_ROW_WAITING
        PF_ROW_RUNNING
        PF_ROW_DRAINING
        PF_LATENCY_BUCKETS

    ctypedef struct pf_row:
        uint32_t pid, slot, generation, state
        int64_t started_ms, heartbeat_ms
        pf_loop_stats stats
        uint64_t *latency

    int pf_scoreboard_open(pf_scoreboard **out, uint32_t rows)
    int pf_scoreboard_attach(pf_scoreboard **out, int fd)
    int pf_scoreboard_fileno(const pf_scoreboard *board)
    void pf_scoreboard_close(pf_scoreboard *board)
    int pf_scoreboard_claim(pf_scoreboard *board, uint32_t slot, uint32_t generation)
    int pf_scoreboard_retire(pf_scoreboard *board, int row)
    int pf_scoreboard_rows(const pf_scoreboard *board)
    pf_row *pf_scoreboard_row(pf_scoreboard *board, int row)
    void pf_scoreboard_totals(const pf_scoreboard *board, pf_row *out)
    int pf_scoreboard_adopt(pf_scoreboard *board, int row, uint32_t slot, int fd)
    int pf_scoreboard_release(pf_scoreboard *board, int row, uint32_t slot)
    pf_tickets *pf_scoreboard_tickets(pf_scoreboard *board)
    uint64_t pf_scoreboard_bound(int bucket)

    # ---- The loop ----
    ctypedef struct pf_loop
    ctypedef struct pf_request

    cdef enum:
        PF_OPTION_LEND_HEADS
        PF_OPTION_LEND_REFUSED
        PF_OPTION_NOTICES
        PF_OPTION_NO_DATE
        PF_OPTION_NO_KEEP_ALIVE
        PF_OPTION_GET_ONLY
        PF_OPTION_TCP_KEEPALIVE
        PF_OPTION_KEEP_ON_DRAIN
        PF_OPTION_WS_DEFLATE

    cdef enum:
        PF_PROXY_V1
        PF_PROXY_V2

    ctypedef struct pf_network:
        uint8_t *bytes
        uint16_t family
        uint8_t prefix

    ctypedef struct pf_options:
        uint32_t max_connections, max_connections_per_ip, max_requests
        uint32_t header_timeout_ms, read_timeout_ms, write_timeout_ms
        uint32_t idle_timeout_ms, linger_timeout_ms, drain_idle_ms, tls_timeout_ms
        uint32_t min_body_rate, read_buffer_size, max_target_size, max_field_size
        uint32_t max_header_size, max_fields
        uint64_t max_body_size
        uint32_t body_buffer_size
        uint32_t ws_max_size, ws_ping_interval_ms, ws_ping_timeout_ms
        uint32_t ws_close_timeout_ms
        const char *spill_dir
        const char *server
        const char *content_type
        unsigned flags, proxy_protocol
        uint32_t proxy_trusted, forwarded_trusted
        const pf_network *proxy_trust
        const pf_network *forwarded_trust

    void pf_options_init(pf_options *options)

    cdef enum:
        PF_EVENT_REQUEST
        PF_EVENT_BODY
        PF_EVENT_WRITABLE
        PF_EVENT_CLOSED
        PF_EVENT_RELEASED
        PF_EVENT_DRAINED
        PF_EVENT_REFUSED
        PF_EVENT_WOKEN
        PF_EVENT_READABLE
        PF_EVENT_ENDED
        PF_EVENT_MESSAGE

    ctypedef struct pf_event:
        uint32_t flags
        int32_t code
        pf_request *request
        void *user

    int pf_loop_open(pf_loop **out, const pf_options *options)
    int pf_loop_attach(pf_loop *loop, pf_scoreboard *board, int row)
    int pf_loop_listen(pf_loop *loop, int fd)
    int pf_loop_secure(pf_loop *loop, pf_tls *tls)
    int pf_loop_watch(pf_loop *loop, int fd)
    int pf_loop_unwatch(pf_loop *loop, int fd)
    int pf_loop_wait(pf_loop *loop, pf_event *events, int max, int timeout_ms)
    int pf_loop_flush(pf_loop *loop)
    int64_t pf_loop_touch(pf_loop *loop)
    int64_t pf_loop_now(const pf_loop *loop)
    int pf_loop_wake(pf_loop *loop)
    void pf_loop_share(pf_loop *loop)
    bint pf_loop_borrow(pf_loop *loop)
    bint pf_loop_poll(pf_loop *loop, pf_event *event)
    void pf_loop_return(pf_loop *loop)
    int pf_loop_fileno(pf_loop *loop)
    bint pf_loop_ready(const pf_loop *loop)
    int pf_loop_wake_fileno(pf_loop *loop)
    int pf_loop_drain(pf_loop *loop, bint sweep, int read_ms)
    void pf_loop_close(pf_loop *loop)
    int pf_loop_take_released(pf_loop *loop, void **refs, int max)
    int pf_loop_free(pf_loop *loop)

    void pf_loop_get_stats(const pf_loop *loop, pf_loop_stats *stats)

    ctypedef struct pf_peer:
        uint8_t *bytes
        uint16_t port, family
        uint32_t scope

    ctypedef struct pf_notice:
        uint64_t connection
        int kind, code
        pf_peer peer
        const char *reason

    int pf_loop_notices(pf_loop *loop, pf_notice *out, int max)

    # ---- A crew ----
    ctypedef struct pf_crew:
        pass

    cdef enum:
        PF_CREW_CALLED
        PF_CREW_STALLED
        PF_CREW_CLOSED
        PF_CREW_APPOINTED

    int pf_crew_open(pf_crew **out, int tick_ms)
    int pf_crew_wait(pf_crew *crew, unsigned long name) nogil
    void pf_crew_begin(pf_crew *crew)
    void pf_crew_end(pf_crew *crew)
    void pf_crew_took_long(pf_crew *crew)
    bint pf_crew_call(pf_crew *crew)
    unsigned long pf_crew_appoint(pf_crew *crew)
    void pf_crew_close(pf_crew *crew)
    void pf_crew_free(pf_crew *crew)

    # ---- Requests ----
    ctypedef struct pf_slice:
        const char *data
        size_t len

    cdef enum:
        PF_WANT_SOME
        PF_WANT_WHOLE

    const pf_head *pf_request_head(const pf_request *request)
    const char *pf_request_bytes(const pf_request *request)
    void pf_request_get_peer(const pf_request *request, pf_peer *peer)
    int pf_request_get_local(const pf_request *request, pf_peer *local)
    int pf_request_tls(const pf_request *request, pf_tls_info *info)
    void pf_request_set_user(pf_request *request, void *user)
    uint64_t pf_request_connection(const pf_request *request)
    bint pf_request_closed(const pf_request *request)
    pf_slice pf_request_body(const pf_request *request)
    bint pf_request_body_done(const pf_request *request)
    int pf_request_consume(pf_request *request, size_t n)
    int pf_request_body_fd(const pf_request *request)
    int pf_request_take_body_fd(pf_request *request)
    uint64_t pf_request_body_size(const pf_request *request)
    int pf_request_want_body(pf_request *request, int want)
    int pf_request_limit(pf_request *request, int64_t max_body_size,
                         int64_t read_timeout_ms, int64_t write_timeout_ms)
    int pf_request_refuse(pf_request *request, int code)
    int pf_request_begin(pf_request *request, int status, int64_t length)
    int pf_request_begin_line(pf_request *request, int status, const char *reason,
                              size_t reason_len, int64_t length)
    int pf_request_set_length(pf_request *request, uint64_t length)
    int64_t pf_request_length(const pf_request *request)
    ctypedef struct pf_line:
        pass
    int pf_response_prepare(pf_line *line, const char *text, size_t name_len,
                            size_t value_len)
    int pf_request_line(pf_request *request, const pf_line *line)
    int pf_request_field(pf_request *request, const char *name, size_t name_len,
                         const char *value, size_t value_len)
    int pf_request_trailers(pf_request *request)
    int pf_request_trailer(pf_request *request, const char *name, size_t name_len,
                           const char *value, size_t value_len)
    int pf_response_check_line(int status, const char *reason, size_t reason_len)
    int pf_response_check_field(const char *name, size_t name_len, const char *value,
                                size_t value_len)
    int pf_request_whole(pf_request *request, const char *data, size_t len, void *ref)
    int pf_request_write(pf_request *request, const char *data, size_t len)
    int pf_request_write_ref(pf_request *request, const char *data, size_t len,
                             void *ref)
    bint pf_request_borrows(const pf_request *request, size_t len)
    int pf_request_write_file(pf_request *request, int fd, int64_t offset,
                              uint64_t len, void *ref)
    int pf_request_reset(pf_request *request)
    int pf_request_end(pf_request *request)
    int pf_request_abort(pf_request *request)
    int pf_request_inform(pf_request *request, int status, const char *fields,
                          size_t len)
    bint pf_request_begun(const pf_request *request)
    size_t pf_request_pending(const pf_request *request)
    int pf_request_want_room(pf_request *request)
    int pf_request_want_end(pf_request *request)
    int pf_request_answer(pf_request *request, int status, const char *content_type,
                          size_t content_type_len, const char *body, size_t len,
                          void *ref)

    # ---- WebSockets ----
    cdef enum:
        PF_MESSAGE_TEXT
        PF_MESSAGE_BINARY

    ctypedef struct pf_message:
        const char *data
        size_t len
        int kind

    int pf_channel_offered(const pf_request *request)
    int pf_channel_begin(pf_request *request, const char *subprotocol, size_t len)
    int pf_channel_open(pf_request *request)
    int pf_channel_receive(pf_request *request, pf_message *message)
    int pf_channel_send_ref(pf_request *request, int kind, const char *data,
                            size_t len, void *ref)
    int pf_channel_close(pf_request *request, int code, const char *reason, size_t len)
    int pf_channel_code(const pf_request *request, pf_slice *reason)


cdef int check(int rc) except -1
cdef int milliseconds(object timeout) except -2
cdef bytes latin(object text)
cdef int check_line(int status, bytes reason) except -1
cdef int check_fields(list fields) except -1
cdef int remember(object pair) except -1
cdef bytes packed(const pf_peer *peer)
cdef str host_of(const pf_peer *peer)

cdef class Scoreboard:
    cdef pf_scoreboard *handle
    cdef int loops  # that count here
    cdef pf_scoreboard *opened(self) except NULL

cdef class Crew:
    cdef pf_crew *handle
    cdef int stand_by(self, Loop loop) except -1
    cdef void begin(self) noexcept
    cdef void end(self) noexcept
    cdef void took_long(self) noexcept
    cdef bint call(self) noexcept
    cdef unsigned long appoint(self) noexcept

cdef enum:
    BATCH = 64  # events handed out in one turn

cdef class Loop:
    cdef pf_loop *handle
    cdef pf_event events[BATCH]
    cdef int count     # of events in the batch at hand
    cdef bint asleep   # its thread is at work without the GIL
    cdef bint waiting  # the same, and while another one has borrowed it
    cdef object calls  # what other threads ask this loop's thread to do
    cdef bint called   # there may be some
    cdef list put_off  # what a borrower does when it has given the loop back
    cdef Scoreboard board  # kept open while the loop counts there
    cdef object desk   # who knows more about requests than they do themselves
    cdef public object trust  # who knows what the word of a proxy means, or None
    cdef public bint secured  # its connections speak TLS
    cdef object __weakref__
    cdef pf_loop *opened(self) except NULL
    cdef int wait_batch(self, int timeout_ms) except -1
    cdef void lie_down(self) noexcept
    cdef int get_up(self, int count) except -1
    cdef void forget(self, pf_request *loan) noexcept
    cdef int64_t touch(self) noexcept
    cdef int64_t now(self) noexcept
    cdef object run_calls(self)
    cdef int share(self) except -1
    cdef bint borrow(self) noexcept
    cdef bint poll(self, pf_event *event) noexcept
    cdef int give_back(self) except -1
    cdef int leave_word(self, function, tuple arguments) except -1
    cpdef int flush(self) except -1
    cdef void send_queued(self) noexcept

cdef class Request:
    cdef pf_request *loan     # NULL once the loan has ended
    cdef Loop loop
    cdef const pf_head *head  # the loan's, or our own copy
    cdef char *copy           # head and bytes of our own, once detached
    cdef bint held            # the loan's events name this object
    cdef object content       # the body, as far as it was taken
    cdef object peer          # (host, port), or the Origin that proxies tell
    cdef object local
    cdef public object exchange
    cdef double handed_on     # when, if the loop was before the handler began, else 0
    cdef void lend(self, Loop loop, pf_request *loan) noexcept
    cdef bint is_blank(self) noexcept
    cdef bint is_whole(self) noexcept
    cdef const char *bytes(self) noexcept
    cdef pf_request *known(self) except NULL
    cdef pf_request *lent(self) except NULL
    cdef int detach(self) except -1
    cdef int hold(self) except -1
    cdef int ended(self) except -1
    cdef int drop(self) except -1
    cdef const pf_head *heading(self) except NULL
    cdef size_t head_size(self) noexcept
    cdef bytes span(self, pf_span span)
    cdef void ends(self, pf_peer *peer, pf_peer *local) noexcept
    cdef bint asks_for_head(self) noexcept
    cdef size_t unsent(self) noexcept
    cdef object origin(self)
    cdef bint is_forwarded(self) except -1
    cdef object told_scheme(self)
    cdef int field(self, object name, object value) except -1
    cdef bint answer(self, int status, bytes content_type, bytes body) except -1
    cdef bint reply(self, int status, list pairs, bytes body) except -1
    cdef int start(self, int status, bytes reason, list fields) except -1
    cdef int tell_length(self, uint64_t length) except -1
    cdef bint put_again(self, object pair) except -1
    cdef int plain_field(self, bytes name, bytes value) except -1
    cdef int announce_trailers(self) except -1
    cdef int trailer(self, bytes name, bytes value) except -1
    cdef int put(self, bytes data) except -1
    cdef int whole(self, bytes data) except -1
    cdef int conclude(self) except -1
    cdef int64_t announced(self) noexcept
    cdef int offered(self) noexcept
    cdef int switch(self, bytes subprotocol, fields) except -1
    cdef object message(self)
    cdef int send_bytes(self, bytes data) except -1
    cdef int send_text(self, str text) except -1
    cdef int close_websocket(self, int code, str reason) except -1
    cdef tuple closing(self)

cdef class Headers:
    cdef Request request
    cdef int find(self, name, int start) except -2
    cdef str value(self, int index)
    cdef str name(self, int index)
