-- Who may use the API. A key is random (256 bits), so a plain SHA-256 of it is enough: there is nothing to guess.

CREATE TABLE api_keys (
    id                      TEXT PRIMARY KEY CHECK (id LIKE 'key\_%' ESCAPE '\'),
    name                    TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    scope                   TEXT NOT NULL CHECK (scope IN ('read', 'submit', 'admin')),
    prefix                  TEXT NOT NULL UNIQUE,          -- the key's first characters: finds the row, shown to people
    sha256                  TEXT NOT NULL CHECK (length(sha256) = 64),
    max_requests_per_minute INTEGER CHECK (max_requests_per_minute > 0), -- NULL in these four: no limit of its own
    max_queued_jobs         INTEGER CHECK (max_queued_jobs >= 0),
    max_running_jobs        INTEGER CHECK (max_running_jobs >= 0),
    max_dataset_bytes       INTEGER CHECK (max_dataset_bytes >= 0),
    created_at_ms           INTEGER NOT NULL,
    expires_at_ms           INTEGER,
    revoked_at_ms           INTEGER,                       -- the row stays: it says who did what
    last_used_at_ms         INTEGER
) STRICT;

-- Browsers that traded a key for a cookie.
CREATE TABLE sessions (
    sha256        TEXT PRIMARY KEY CHECK (length(sha256) = 64), -- of the cookie's value
    key_id        TEXT NOT NULL REFERENCES api_keys (id) ON DELETE CASCADE,
    created_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Who posted it; NULL: nobody was asked.
ALTER TABLE jobs ADD COLUMN key_id TEXT REFERENCES api_keys (id) ON DELETE SET NULL;
ALTER TABLE datasets ADD COLUMN key_id TEXT REFERENCES api_keys (id) ON DELETE SET NULL;
CREATE INDEX jobs_by_key ON jobs (key_id, status) WHERE key_id IS NOT NULL;
CREATE INDEX datasets_by_key ON datasets (key_id) WHERE key_id IS NOT NULL;
