-- How fast the steps of finished jobs were: what corrects the next estimate. Rows outlive their jobs.
CREATE TABLE measured_runs (
    job_id            TEXT PRIMARY KEY,
    device            TEXT NOT NULL,
    base_model        TEXT NOT NULL,
    workload          TEXT NOT NULL,   -- of the job's plan
    modelled_step_s   REAL NOT NULL,   -- by arithmetic and calibration alone
    measured_step_s   REAL NOT NULL,   -- median of the job's steps
    memory_bytes      INTEGER NOT NULL, -- estimated peak
    peak_memory_bytes INTEGER,         -- measured, where the system tells
    t_ms              INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX measured_runs_by_device ON measured_runs (device, t_ms DESC);

-- Whether a job's newest attempt begins with half the micro-batch, because one before ran out of memory.
ALTER TABLE jobs ADD COLUMN memory_rescues INTEGER NOT NULL DEFAULT 0;
