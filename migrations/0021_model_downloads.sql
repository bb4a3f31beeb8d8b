-- Base models on their way from a hub. A row goes when the model is registered, or the download cancelled.
CREATE TABLE model_downloads (
    id            TEXT PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 64), -- the model's slug
    repository    TEXT NOT NULL,                -- owner/name
    revision      TEXT NOT NULL,                -- as asked
    commit_sha    TEXT NOT NULL CHECK (length(commit_sha) = 40),
    licence       TEXT NOT NULL DEFAULT '',
    status        TEXT NOT NULL CHECK (status IN ('downloading', 'failed')),
    total_bytes   INTEGER NOT NULL CHECK (total_bytes >= 0),
    error         TEXT CHECK (error IS NULL OR json_valid(error)),
    created_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
