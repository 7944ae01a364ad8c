/* Attention from C: forward and backward on one thread, then on a pool of this program's own, the same bits.
 *
 *     cc -O2 examples/attention.c -o attention $(pkg-config --cflags --libs heedful) -pthread -lm
 *
 * where PKG_CONFIG_PATH has $(python -c 'import heedful; print(heedful.get_library_dir())')/pkgconfig; running it takes
 * that folder in LD_LIBRARY_PATH, or in the program with -Wl,-rpath,.
 */
#include <heedful.h>

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 2, HEADS = 4, KV_HEADS = 2, QUERIES = 70, KEYS = 90, DIM = 32, THREADS = 3 };

/* Some threads that wait for work. One call is served at a time; further ones wait for it. */
typedef struct pool {
    pthread_mutex_t call, state;
    pthread_cond_t work, done;
    void (*body)(void *argument, int64_t index);
    void *argument;
    int64_t next, count, unfinished;
    int closing;
    pthread_t threads[THREADS - 1];
} pool;

/* Calls body while there are indices left. With `state` locked before and after. */
static void serve(pool *p) {
    while (p->next < p->count) {
        const int64_t index = p->next++;
        pthread_mutex_unlock(&p->state);
        p->body(p->argument, index);
        pthread_mutex_lock(&p->state);
        if (--p->unfinished == 0) pthread_cond_signal(&p->done);
    }
}

static void *wait_for_work(void *argument) {
    pool *const p = argument;
    pthread_mutex_lock(&p->state);
    while (!p->closing) {
        serve(p);
        pthread_cond_wait(&p->work, &p->state);
    }
    pthread_mutex_unlock(&p->state);
    return NULL;
}

/* What the engine calls: see heedful_threads. */
static void run(void *argument, int64_t count, void (*body)(void *argument, int64_t index), void *body_argument) {
    pool *const p = argument;
    pthread_mutex_lock(&p->call);
    pthread_mutex_lock(&p->state);
    p->body = body;
    p->argument = body_argument;
    p->next = 0;
    p->count = p->unfinished = count;
    pthread_cond_broadcast(&p->work);
    serve(p);
    while (p->unfinished > 0) pthread_cond_wait(&p->done, &p->state);
    pthread_mutex_unlock(&p->state);
    pthread_mutex_unlock(&p->call);
}

static void start(pool *p) {
    memset(p, 0, sizeof *p);
    pthread_mutex_init(&p->call, NULL);
    pthread_mutex_init(&p->state, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->done, NULL);
    for (int i = 0; i < THREADS - 1; ++i) pthread_create(&p->threads[i], NULL, wait_for_work, p);
}

static void stop(pool *p) {
    pthread_mutex_lock(&p->state);
    p->closing = 1;
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->state);
    for (int i = 0; i < THREADS - 1; ++i) pthread_join(p->threads[i], NULL);
}

/* Numbers of (batch, length, heads, dim) in memory, seen as the engine counts them: (batch, heads, length, dim). */
static heedful_tensor tensor(float *data, int64_t heads, int64_t length) {
    const heedful_tensor view = {
        data, HEEDFUL_FLOAT32, 4, {BATCH, heads, length, DIM}, {length * heads * DIM, DIM, heads * DIM, 1}};
    return view;
}

static heedful_tensor per_query(float *data) {
    const heedful_tensor view = {
        data, HEEDFUL_FLOAT32, 3, {BATCH, HEADS, QUERIES, 0}, {HEADS * QUERIES, QUERIES, 1, 0}};
    return view;
}

static float *numbers(size_t count, double seed) {
    float *const data = malloc(count * sizeof *data);
    for (size_t i = 0; i < count; ++i) data[i] = (float)sin(seed + 0.37 * (double)i);
    return data;
}

static void check(heedful_status status) {
    if (status == HEEDFUL_OK) return;
    fprintf(stderr, "heedful: %s\n", heedful_error_message());
    exit(1);
}

static double sum(const float *data, size_t count) {
    double total = 0;
    for (size_t i = 0; i < count; ++i) total += (double)data[i] * (double)(i % 7 + 1);
    return total;
}

/* One output by the definition of causal attention. */
static double expected(const float *q, const float *k, const float *v, int b, int h, int i, int d) {
    double total = 0, weighted = 0;
    for (int j = 0; j <= i + KEYS - QUERIES; ++j) {
        const float *const key = k + ((b * KEYS + j) * KV_HEADS + h / (HEADS / KV_HEADS)) * DIM;
        const float *const query = q + ((b * QUERIES + i) * HEADS + h) * DIM;
        double score = 0;
        for (int c = 0; c < DIM; ++c) score += (double)query[c] * (double)key[c];
        const double weight = exp(score / sqrt(DIM));
        total += weight;
        weighted += weight * (double)v[key - k + d];
    }
    return weighted / total;
}

int main(void) {
    if (heedful_abi_version() != HEEDFUL_ABI_VERSION) {
        fprintf(stderr, "compiled for interface %d, the library has %d\n", HEEDFUL_ABI_VERSION, heedful_abi_version());
        return 1;
    }
    const size_t q_count = (size_t)BATCH * QUERIES * HEADS * DIM, k_count = (size_t)BATCH * KEYS * KV_HEADS * DIM;
    const size_t rows = (size_t)BATCH * HEADS * QUERIES;
    float *const q = numbers(q_count, 0), *const k = numbers(k_count, 1), *const v = numbers(k_count, 2);
    float *const grad_out = numbers(q_count, 3);
    float *out[2], *lse[2], *grad_q[2], *grad_k[2], *grad_v[2], *const delta = malloc(rows * sizeof *delta);
    const int64_t causal[] = HEEDFUL_CAUSAL;

    pool workers;
    start(&workers);
    const heedful_threads threads = {THREADS, run, &workers};
    for (int pooled = 0; pooled < 2; ++pooled) {
        out[pooled] = malloc(q_count * sizeof(float));
        lse[pooled] = malloc(rows * sizeof(float));
        grad_q[pooled] = malloc(q_count * sizeof(float));
        grad_k[pooled] = malloc(k_count * sizeof(float));
        grad_v[pooled] = malloc(k_count * sizeof(float));

        heedful_forward forward = {0};
        forward.query = tensor(q, HEADS, QUERIES);
        forward.key = tensor(k, KV_HEADS, KEYS);
        forward.value = tensor(v, KV_HEADS, KEYS);
        forward.out = tensor(out[pooled], HEADS, QUERIES);
        forward.lse = per_query(lse[pooled]);
        forward.scale = 1 / sqrt(DIM);
        forward.schedule.code = causal;
        forward.schedule.code_length = sizeof causal / sizeof *causal;
        check(heedful_attention_forward(&forward, pooled ? &threads : NULL));

        heedful_backward backward = {0};
        backward.query = forward.query;
        backward.key = forward.key;
        backward.value = forward.value;
        backward.out = forward.out;
        backward.lse = forward.lse;
        backward.scale = forward.scale;
        backward.schedule = forward.schedule;
        backward.grad_out = tensor(grad_out, HEADS, QUERIES);
        backward.grad_query = tensor(grad_q[pooled], HEADS, QUERIES);
        backward.grad_key = tensor(grad_k[pooled], KV_HEADS, KEYS);
        backward.grad_value = tensor(grad_v[pooled], KV_HEADS, KEYS);
        backward.delta = per_query(delta);
        check(heedful_attention_backward(&backward, pooled ? &threads : NULL));
    }
    stop(&workers);

    double worst = 0;
    for (int b = 0; b < BATCH; ++b)
        for (int h = 0; h < HEADS; ++h)
            for (int i = 0; i < QUERIES; ++i)
                for (int d = 0; d < DIM; ++d) {
                    const double found = out[0][((b * QUERIES + i) * HEADS + h) * DIM + d];
                    worst = fmax(worst, fabs(found - expected(q, k, v, b, h, i, d)));
                }
    const int same = !memcmp(out[0], out[1], q_count * sizeof(float)) &&
                     !memcmp(lse[0], lse[1], rows * sizeof(float)) &&
                     !memcmp(grad_q[0], grad_q[1], q_count * sizeof(float)) &&
                     !memcmp(grad_k[0], grad_k[1], k_count * sizeof(float)) &&
                     !memcmp(grad_v[0], grad_v[1], k_count * sizeof(float));
    printf("heedful %s, %s\n", heedful_version(), heedful_isa_name(heedful_isa_selected()));
    printf("out %.9g lse %.9g grad_query %.9g grad_key %.9g grad_value %.9g\n", sum(out[0], q_count), sum(lse[0], rows),
           sum(grad_q[0], q_count), sum(grad_k[0], k_count), sum(grad_v[0], k_count));
    printf("off by %.1e from the definition; %d threads: %s\n", worst, THREADS, same ? "the same bits" : "other bits");
    for (int pooled = 0; pooled < 2; ++pooled) {
        float *const made[] = {out[pooled], lse[pooled], grad_q[pooled], grad_k[pooled], grad_v[pooled]};
        for (size_t n = 0; n < sizeof made / sizeof *made; ++n) free(made[n]);
    }
    float *const inputs[] = {q, k, v, grad_out, delta};
    for (size_t n = 0; n < sizeof inputs / sizeof *inputs; ++n) free(inputs[n]);
    return worst < 1e-5 && same ? 0 : 1;
}
