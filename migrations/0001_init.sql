-- The first schema. Times are milliseconds since the Unix epoch, UTC; JSON columns hold text that parses as JSON.
-- Only src/store speaks SQL. Migrations go forward only.

-- Base models and finished adapters, known by a slug.
CREATE TABLE models (
    id            TEXT PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 64),
    kind          TEXT NOT NULL CHECK (kind IN ('base', 'adapter')),
    family        TEXT NOT NULL,
    path          TEXT NOT NULL,                      -- absolute folder
    source        TEXT NOT NULL,                      -- 'bundled', 'folder', 'job:<id>', 'hub:<owner/name@revision>'
    licence       TEXT NOT NULL DEFAULT '',
    builtin       INTEGER NOT NULL DEFAULT 0 CHECK (builtin IN (0, 1)),
    info          TEXT NOT NULL CHECK (json_valid(info)),  -- what the trainer found in the folder
    created_at_ms INTEGER NOT NULL
) STRICT;

-- Ingested datasets. Their files lie in the data directory; a dataset that a job used is never changed.
CREATE TABLE datasets (
    id            TEXT PRIMARY KEY CHECK (id LIKE 'ds\_%' ESCAPE '\'),
    name          TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    modality      TEXT NOT NULL,                      -- 'image'
    path          TEXT NOT NULL,                      -- absolute folder
    n_items       INTEGER NOT NULL CHECK (n_items >= 0),
    bytes         INTEGER NOT NULL CHECK (bytes >= 0),
    sha256        TEXT NOT NULL CHECK (length(sha256) = 64), -- of the upload
    builtin       INTEGER NOT NULL DEFAULT 0 CHECK (builtin IN (0, 1)),
    report        TEXT NOT NULL CHECK (json_valid(report)),
    created_at_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX datasets_by_name ON datasets (name);

-- Jobs. `status` is what is, `desired` is what was asked.
CREATE TABLE jobs (
    id                 TEXT PRIMARY KEY CHECK (id LIKE 'job\_%' ESCAPE '\'),
    parent_id          TEXT REFERENCES jobs (id) ON DELETE SET NULL, -- the job this one retries or clones
    name               TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    tags               TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(tags)),
    notes              TEXT NOT NULL DEFAULT '',
    priority           INTEGER NOT NULL DEFAULT 0 CHECK (priority BETWEEN -1000 AND 1000),
    status             TEXT NOT NULL CHECK (status IN ('validating', 'queued', 'preparing', 'running', 'paused',
                           'interrupted', 'saving', 'succeeded', 'failed', 'cancelled')),
    desired            TEXT NOT NULL DEFAULT 'run' CHECK (desired IN ('run', 'pause', 'cancel_save', 'cancel_discard',
                           'cancel_force')),
    base_model         TEXT NOT NULL REFERENCES models (id),
    dataset_id         TEXT NOT NULL REFERENCES datasets (id),
    family             TEXT NOT NULL,
    request            TEXT NOT NULL CHECK (json_valid(request)),          -- as given
    hyperparameters    TEXT NOT NULL CHECK (json_valid(hyperparameters)),  -- resolved: every default filled in
    sampling           TEXT NOT NULL CHECK (json_valid(sampling)),
    export             TEXT NOT NULL CHECK (json_valid(export)),
    plan               TEXT NOT NULL CHECK (json_valid(plan)),
    total_steps        INTEGER NOT NULL CHECK (total_steps >= 0),
    step               INTEGER NOT NULL DEFAULT 0 CHECK (step >= 0),
    phase              TEXT,                           -- of the running attempt
    attempt            INTEGER NOT NULL DEFAULT 0,     -- the fence: a write under an older number is refused
    failed_attempts    INTEGER NOT NULL DEFAULT 0,     -- interruptions in a row without a new checkpoint
    not_before_ms      INTEGER NOT NULL DEFAULT 0,     -- backoff after an interruption
    lease_expires_ms   INTEGER,                        -- for people; the scheduler counts on the monotonic clock
    checkpoint_request INTEGER NOT NULL DEFAULT 0,     -- number of the newest request, and of the newest served
    checkpoint_served  INTEGER NOT NULL DEFAULT 0,
    sample_request     INTEGER NOT NULL DEFAULT 0,
    sample_served      INTEGER NOT NULL DEFAULT 0,
    last_seq           INTEGER NOT NULL DEFAULT 0,     -- newest job_events.seq
    created_at_ms      INTEGER NOT NULL,
    started_at_ms      INTEGER,                        -- first step of the first attempt
    finished_at_ms     INTEGER,
    error              TEXT CHECK (error IS NULL OR json_valid(error)),
    summary            TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(summary)),
    CHECK ((status IN ('succeeded', 'failed', 'cancelled')) = (finished_at_ms IS NOT NULL)),
    CHECK (status <> 'failed' OR error IS NOT NULL)
) STRICT;
CREATE INDEX jobs_queue ON jobs (priority DESC, id) WHERE status = 'queued';
CREATE INDEX jobs_by_status ON jobs (status, id);

-- The second guard of the state machine (the first is domain::job::JobStatus::next, tested against this table).
CREATE TABLE job_transitions (
    from_status TEXT NOT NULL,
    to_status   TEXT NOT NULL,
    PRIMARY KEY (from_status, to_status)
) STRICT, WITHOUT ROWID;
INSERT INTO job_transitions (from_status, to_status) VALUES
    ('validating', 'queued'), ('validating', 'failed'), ('validating', 'cancelled'),
    ('queued', 'preparing'), ('queued', 'paused'), ('queued', 'cancelled'),
    ('preparing', 'running'), ('preparing', 'saving'), ('preparing', 'paused'), ('preparing', 'interrupted'),
    ('preparing', 'failed'), ('preparing', 'cancelled'),
    ('running', 'saving'), ('running', 'paused'), ('running', 'interrupted'), ('running', 'failed'),
    ('running', 'cancelled'),
    ('paused', 'queued'), ('paused', 'cancelled'),
    ('interrupted', 'queued'), ('interrupted', 'failed'), ('interrupted', 'cancelled'),
    ('saving', 'succeeded'), ('saving', 'interrupted'), ('saving', 'failed'), ('saving', 'cancelled');

CREATE TRIGGER jobs_status_guard BEFORE UPDATE OF status ON jobs
WHEN OLD.status <> NEW.status
    AND NOT EXISTS (SELECT 1 FROM job_transitions WHERE from_status = OLD.status AND to_status = NEW.status)
BEGIN
    SELECT RAISE(ABORT, 'illegal job status transition');
END;
CREATE TRIGGER jobs_birth_guard BEFORE INSERT ON jobs
WHEN NEW.status NOT IN ('validating', 'queued')
BEGIN
    SELECT RAISE(ABORT, 'a job is born validating or queued');
END;
CREATE TRIGGER jobs_fence_guard BEFORE UPDATE OF attempt ON jobs
WHEN NEW.attempt < OLD.attempt
BEGIN
    SELECT RAISE(ABORT, 'the attempt number never falls');
END;

-- One run of a worker process.
CREATE TABLE job_attempts (
    job_id       TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    attempt      INTEGER NOT NULL CHECK (attempt >= 1),
    token_sha256 TEXT NOT NULL CHECK (length(token_sha256) = 64),
    device       TEXT NOT NULL,
    dir          TEXT NOT NULL,                        -- absolute
    pid          INTEGER,
    pid_start    INTEGER,                              -- /proc/<pid>/stat field 22: tells a reused pid
    resumed_from INTEGER,                              -- optimizer steps in the checkpoint it started from
    acked_seq    INTEGER NOT NULL DEFAULT 0,           -- worker events stored so far
    final_event  TEXT CHECK (final_event IS NULL OR json_valid(final_event)),
    started_at_ms INTEGER NOT NULL,
    ended_at_ms  INTEGER,                              -- when the process was seen dead; until then it holds its device
    exit         TEXT,                                 -- how, for people
    PRIMARY KEY (job_id, attempt)
) STRICT, WITHOUT ROWID;
CREATE INDEX job_attempts_alive ON job_attempts (device) WHERE ended_at_ms IS NULL;

-- Everything a viewer resumes, under one number per job.
CREATE TABLE job_events (
    job_id  TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    seq     INTEGER NOT NULL CHECK (seq >= 1),
    kind    TEXT NOT NULL CHECK (kind IN ('status', 'metrics', 'log', 'sample', 'checkpoint', 'alert')),
    t_ms    INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    data    TEXT NOT NULL CHECK (json_valid(data)),
    PRIMARY KEY (job_id, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX job_events_by_kind ON job_events (job_id, kind, seq);

-- One row per optimizer step; a resumed attempt replaces the steps it repeats.
CREATE TABLE job_metrics (
    job_id        TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    step          INTEGER NOT NULL CHECK (step >= 0),
    attempt       INTEGER NOT NULL,
    t_ms          INTEGER NOT NULL,
    epoch         REAL NOT NULL,
    loss          REAL,                                -- NULL: not finite
    lr            REAL NOT NULL,
    grad_norm     REAL,                                -- NULL: not finite
    step_ms       REAL NOT NULL,
    samples_per_s REAL NOT NULL,
    extra         TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(extra)),
    PRIMARY KEY (job_id, step)
) STRICT, WITHOUT ROWID;

-- Published files. The bytes lie in the blob store under artifacts/<job>/<name>.
CREATE TABLE artifacts (
    job_id        TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    name          TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 255 AND instr(name, '/') = 0),
    kind          TEXT NOT NULL CHECK (kind IN ('diffusers', 'kohya', 'peft', 'merged', 'receipt', 'config', 'sample')),
    bytes         INTEGER NOT NULL CHECK (bytes >= 0),
    sha256        TEXT NOT NULL CHECK (length(sha256) = 64),
    attempt       INTEGER NOT NULL,
    created_at_ms INTEGER NOT NULL,
    PRIMARY KEY (job_id, name)
) STRICT, WITHOUT ROWID;

-- Sample pictures; the file is the artifact of the same name.
CREATE TABLE job_samples (
    job_id       TEXT NOT NULL,
    file         TEXT NOT NULL,
    step         INTEGER NOT NULL,
    prompt_index INTEGER NOT NULL,
    prompt       TEXT NOT NULL,
    seed         INTEGER NOT NULL,                     -- two's complement of an unsigned 64-bit seed
    width        INTEGER NOT NULL,
    height       INTEGER NOT NULL,
    t_ms         INTEGER NOT NULL,
    PRIMARY KEY (job_id, file),
    FOREIGN KEY (job_id, file) REFERENCES artifacts (job_id, name) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX job_samples_by_step ON job_samples (job_id, step, prompt_index);

-- Checkpoints that workers announced.
CREATE TABLE job_checkpoints (
    job_id  TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    step    INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    path    TEXT NOT NULL,                             -- absolute
    bytes   INTEGER NOT NULL,
    sha256  TEXT NOT NULL CHECK (length(sha256) = 64), -- of its manifest.json
    t_ms    INTEGER NOT NULL,
    PRIMARY KEY (job_id, step, attempt)
) STRICT, WITHOUT ROWID;

-- Answers kept for 24 hours; `status` NULL: the first request is still at work.
CREATE TABLE idempotency_keys (
    key           TEXT NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    scope         TEXT NOT NULL,                       -- method and path
    body_sha256   TEXT NOT NULL CHECK (length(body_sha256) = 64),
    status        INTEGER,
    location      TEXT,
    body          TEXT,
    created_at_ms INTEGER NOT NULL,
    PRIMARY KEY (key, scope)
) STRICT, WITHOUT ROWID;

-- The few settings that the API changes, e.g. queue_paused.
CREATE TABLE settings (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
