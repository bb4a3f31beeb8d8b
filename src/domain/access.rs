//! Who may do what: API keys, their scopes and their quotas.

use serde::{Deserialize, Serialize};

use super::{id::KeyId, job::text_enum};

text_enum!(
    /// What a key may do; each scope holds the ones before it.
    Scope {
        /// Look at everything but keys, webhooks and the audit log.
        Read = "read",
        /// Also upload datasets, submit jobs, steer and delete both.
        Submit = "submit",
        /// Also register models, and manage keys and webhooks.
        Admin = "admin",
    }
);

impl Scope {
    /// Whether a key with this scope may do what needs `other`.
    pub fn covers(self, other: Self) -> bool {
        self as u8 >= other as u8
    }
}

/// What a key may use at most; `None`: no limit beside the server's own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// Requests in a minute.
    pub requests_per_minute: Option<u32>,
    /// Jobs that wait.
    pub queued_jobs: Option<u32>,
    /// Jobs at work at the same time; more wait.
    pub running_jobs: Option<u32>,
    /// All its datasets together.
    pub dataset_bytes: Option<u64>,
}

/// A key to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewApiKey {
    /// For people; 1 to 100 characters.
    pub name: String,
    /// What it may do.
    pub scope: Scope,
    /// Its first characters.
    pub prefix: String,
    /// SHA-256 of the key, hex.
    pub sha256: String,
    /// When it ends.
    pub expires_at_ms: Option<i64>,
    /// What it may use.
    pub quota: Quota,
}

/// A key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// `key_…`
    pub id: KeyId,
    /// For people.
    pub name: String,
    /// What it may do.
    pub scope: Scope,
    /// Its first characters.
    pub prefix: String,
    /// What it may use.
    pub quota: Quota,
    /// When it was made.
    pub created_at_ms: i64,
    /// When it ends.
    pub expires_at_ms: Option<i64>,
    /// When it was revoked.
    pub revoked_at_ms: Option<i64>,
    /// When it was last used, to the minute.
    pub last_used_at_ms: Option<i64>,
}

impl ApiKey {
    /// Whether it opens anything at `now_ms`.
    pub fn is_valid(&self, now_ms: i64) -> bool {
        self.revoked_at_ms.is_none() && self.expires_at_ms.is_none_or(|end| now_ms < end)
    }
}

/// What may change about a key. Its scope never does: a key that can do more is a new key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApiKeyPatch {
    /// New name.
    pub name: Option<String>,
    /// New end; `Some(None)`: none.
    pub expires_at_ms: Option<Option<i64>>,
    /// New quotas, all of them.
    pub quota: Option<Quota>,
}

/// Something that was asked for and would change something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    /// Grows with time; 0 before it is stored.
    pub id: i64,
    /// When.
    pub t_ms: i64,
    /// With which key, and its name then.
    pub key: Option<(KeyId, String)>,
    /// Where from.
    pub address: String,
    /// `POST`, …
    pub method: String,
    /// What on, without the query.
    pub path: String,
    /// Id of what was made.
    pub object: Option<String>,
    /// What came of it, as an HTTP status.
    pub status: u16,
    /// Of the request.
    pub request_id: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_covers_itself_and_what_is_smaller() {
        for (i, scope) in Scope::ALL.iter().enumerate() {
            for (j, other) in Scope::ALL.iter().enumerate() {
                assert_eq!(scope.covers(*other), i >= j, "{scope} and {other}");
            }
        }
    }
}
