-- Outward calls. An event is stored in the transaction that changes the job, and sent from here: a crash loses none.

CREATE TABLE webhooks (
    id               TEXT PRIMARY KEY CHECK (id LIKE 'wh\_%' ESCAPE '\'),
    job_id           TEXT REFERENCES jobs (id) ON DELETE CASCADE, -- only this job's events; NULL: every job's
    url              TEXT NOT NULL CHECK (length(url) BETWEEN 1 AND 2000),
    events           TEXT NOT NULL CHECK (json_valid(events)),    -- names
    secret           TEXT NOT NULL,                               -- signs, so it cannot be kept as a hash
    description      TEXT NOT NULL DEFAULT '',
    enabled          INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    disabled_reason  TEXT,
    failing_since_ms INTEGER,                                     -- NULL: the newest attempt succeeded
    created_at_ms    INTEGER NOT NULL
) STRICT;
CREATE INDEX webhooks_by_job ON webhooks (job_id);

-- The outbox, and the log of what became of it.
CREATE TABLE webhook_deliveries (
    id              TEXT PRIMARY KEY CHECK (id LIKE 'msg\_%' ESCAPE '\'), -- the same in every attempt: `webhook-id`
    webhook_id      TEXT NOT NULL REFERENCES webhooks (id) ON DELETE CASCADE,
    event           TEXT NOT NULL,
    payload         TEXT NOT NULL CHECK (json_valid(payload)),            -- to the byte: it is signed
    status          TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'delivered', 'failed')),
    tries           INTEGER NOT NULL DEFAULT 0,                           -- since it was queued, the last time
    next_attempt_ms INTEGER,
    created_at_ms   INTEGER NOT NULL,
    CHECK ((status = 'pending') = (next_attempt_ms IS NOT NULL))
) STRICT;
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (next_attempt_ms) WHERE status = 'pending';
CREATE INDEX webhook_deliveries_by_webhook ON webhook_deliveries (webhook_id, id);

CREATE TABLE webhook_attempts (
    delivery_id TEXT NOT NULL REFERENCES webhook_deliveries (id) ON DELETE CASCADE,
    attempt     INTEGER NOT NULL CHECK (attempt >= 1),
    t_ms        INTEGER NOT NULL,
    duration_ms INTEGER NOT NULL,
    http_status INTEGER,
    error       TEXT,                                                     -- NULL: delivered
    PRIMARY KEY (delivery_id, attempt)
) STRICT, WITHOUT ROWID;
