/*
 * The Mandelbrot set, computed by an ordinary MPI program.
 *
 * Theory of operation.  Rank 0 hands out the rows of the picture and collects them; every other rank computes one
 * row at a time and sends it back.  Each worker gets two rows to begin with, so that it computes while its last row
 * travels.  Which worker computes which row depends on timing; what is in a row does not, so the picture is the same,
 * byte for byte, whatever the number of ranks and wherever they run.  Compile with -ffp-contract=off and for the
 * baseline instruction set: a fused multiply-add rounds once where a multiply and an add round twice.
 *
 * The program knows nothing of virtual machines, snapshots or restores.
 *
 * Use: mandelbrot WIDTH HEIGHT ITERATIONS PICTURE.ppm
 * Rank 0 prints "row DONE/HEIGHT" on standard output now and then.  Exit status 0 when the picture is written.
 */
#include <errno.h>
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TAG_ROW, TAG_RESULT, TAG_STOP };
enum { ROWS_AHEAD = 2, PROGRESS_LINES = 100, MAX_SIDE = 16384, MAX_ITERATIONS = 10000000 };

struct job {
    int width;
    int height;
    int iterations;
    const char *picture;
};

/* A worker's answer: the row's number, then the iteration count of each of its points. */
static int result_length(const struct job *job) { return job->width + 1; }

static int escape_time(double cx, double cy, int limit)
{
    double x = 0.0, y = 0.0;
    int n = 0;

    while (n < limit) {
        double xx = x * x, yy = y * y;

        if (xx + yy > 4.0)
            break;
        y = 2.0 * x * y + cy;
        x = xx - yy + cx;
        n++;
    }
    return n;
}

/* The view is 3.2 wide around -0.7, and as high as square points make it. */
static void compute_row(const struct job *job, int row, int *result)
{
    double step = 3.2 / job->width;
    double cy = (row - (job->height - 1) / 2.0) * step;

    result[0] = row;
    for (int column = 0; column < job->width; column++) {
        double cx = (column - (job->width - 1) / 2.0) * step - 0.7;

        result[1 + column] = escape_time(cx, cy, job->iterations);
    }
}

/* Up and down again between 0 and 255, so that neighboring counts have neighboring colors. */
static uint8_t wave(int n, int speed, int offset)
{
    int phase = (n * speed + offset) % 512;

    return (uint8_t)(phase < 256 ? phase : 511 - phase);
}

static void paint_row(const struct job *job, const int *result, uint8_t *picture)
{
    uint8_t *pixel = picture + (size_t)result[0] * job->width * 3;

    for (int column = 0; column < job->width; column++, pixel += 3) {
        int n = result[1 + column];

        if (n == job->iterations)
            continue; /* inside the set: black */
        pixel[0] = wave(n, 5, 0);
        pixel[1] = wave(n, 9, 40);
        pixel[2] = wave(n, 14, 110);
    }
}

static void report_progress(const struct job *job, int done)
{
    int interval = job->height / PROGRESS_LINES > 0 ? job->height / PROGRESS_LINES : 1;

    if (done % interval == 0 || done == job->height) {
        printf("row %d/%d\n", done, job->height);
        fflush(stdout);
    }
}

/* A blocking receive of this MPI spins; rank 0 mostly waits and leaves the processor to others. */
static void wait_for_result(MPI_Status *status)
{
    const struct timespec pause = {.tv_nsec = 2000000};
    int arrived = 0;

    for (;;) {
        MPI_Iprobe(MPI_ANY_SOURCE, TAG_RESULT, MPI_COMM_WORLD, &arrived, status);
        if (arrived)
            return;
        nanosleep(&pause, NULL);
    }
}

static void hand_out(const struct job *job, int worker, int *next)
{
    if (*next >= job->height)
        return;
    MPI_Send(next, 1, MPI_INT, worker, TAG_ROW, MPI_COMM_WORLD);
    ++*next;
}

static void stop_workers(int ranks)
{
    int nothing = 0;

    for (int worker = 1; worker < ranks; worker++)
        MPI_Send(&nothing, 1, MPI_INT, worker, TAG_STOP, MPI_COMM_WORLD);
}

static void collect(const struct job *job, int ranks, int *result, uint8_t *picture)
{
    int next = 0;

    for (int ahead = 0; ahead < ROWS_AHEAD; ahead++)
        for (int worker = 1; worker < ranks; worker++)
            hand_out(job, worker, &next);
    for (int done = 1; done <= job->height; done++) {
        MPI_Status status;

        wait_for_result(&status);
        MPI_Recv(result, result_length(job), MPI_INT, status.MPI_SOURCE, TAG_RESULT, MPI_COMM_WORLD, &status);
        hand_out(job, status.MPI_SOURCE, &next);
        paint_row(job, result, picture);
        report_progress(job, done);
    }
    stop_workers(ranks);
}

static void compute_alone(const struct job *job, int *result, uint8_t *picture)
{
    for (int row = 0; row < job->height; row++) {
        compute_row(job, row, result);
        paint_row(job, result, picture);
        report_progress(job, row + 1);
    }
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);

    if (!memory) {
        fprintf(stderr, "mandelbrot: no memory for %zu bytes\n", count * size);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    return memory;
}

static int write_picture(const struct job *job, const uint8_t *picture)
{
    size_t length = (size_t)job->width * job->height * 3;
    FILE *file = fopen(job->picture, "wb");

    if (!file)
        return -1;
    if (fprintf(file, "P6\n%d %d\n255\n", job->width, job->height) < 0 || fwrite(picture, 1, length, file) != length) {
        fclose(file);
        return -1;
    }
    return fclose(file);
}

static int master(const struct job *job, int ranks)
{
    int *result = allocate(result_length(job), sizeof *result);
    uint8_t *picture = allocate((size_t)job->width * job->height, 3);
    int failed;

    if (ranks > 1)
        collect(job, ranks, result, picture);
    else
        compute_alone(job, result, picture);
    failed = write_picture(job, picture);
    if (failed)
        fprintf(stderr, "mandelbrot: cannot write %s: %s\n", job->picture, strerror(errno));
    free(picture);
    free(result);
    return failed ? 1 : 0;
}

static int worker(const struct job *job)
{
    int *result = allocate(result_length(job), sizeof *result);

    for (;;) {
        MPI_Status status;
        int row;

        MPI_Recv(&row, 1, MPI_INT, 0, MPI_ANY_TAG, MPI_COMM_WORLD, &status);
        if (status.MPI_TAG == TAG_STOP)
            break;
        compute_row(job, row, result);
        MPI_Send(result, result_length(job), MPI_INT, 0, TAG_RESULT, MPI_COMM_WORLD);
    }
    free(result);
    return 0;
}

/* A whole number from 1 to limit, or 0. */
static int positive(const char *text, int limit)
{
    char *end;
    long value = strtol(text, &end, 10);

    return *text && !*end && value >= 1 && value <= limit ? (int)value : 0;
}

static int parse(int argc, char **argv, struct job *job)
{
    if (argc != 5)
        return -1;
    job->width = positive(argv[1], MAX_SIDE);
    job->height = positive(argv[2], MAX_SIDE);
    job->iterations = positive(argv[3], MAX_ITERATIONS);
    job->picture = argv[4];
    return job->width && job->height && job->iterations ? 0 : -1;
}

int main(int argc, char **argv)
{
    struct job job;
    int rank, ranks, status;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    if (parse(argc, argv, &job)) {
        if (rank == 0)
            fprintf(stderr, "use: mandelbrot WIDTH HEIGHT ITERATIONS PICTURE.ppm (whole numbers; sides up to %d)\n",
                    MAX_SIDE);
        MPI_Finalize();
        return 2;
    }
    status = rank == 0 ? master(&job, ranks) : worker(&job);
    MPI_Finalize();
    return status;
}
