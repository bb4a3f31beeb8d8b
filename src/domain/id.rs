//! Typed ids. Jobs and datasets get a prefix and a UUIDv7, so they sort by time; models are known by a slug.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// A text that is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a {kind} id: {text:?} ({expected})")]
pub struct IdError {
    kind: &'static str,
    expected: &'static str,
    text: String,
}

macro_rules! time_sortable_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A new id, greater than every one made before in this process.
            #[expect(clippy::new_without_default, reason = "a new value on every call is no default")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            /// Its digits as bytes.
            pub fn to_bytes(self) -> [u8; 16] {
                self.0.into_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0.simple())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let error = || IdError {
                    kind: $kind,
                    expected: concat!("expected ", $prefix, " and 32 lower-case hex digits"),
                    text: text.chars().take(64).collect(),
                };
                let hex = text.strip_prefix($prefix).ok_or_else(error)?;
                // `Uuid` also parses braces, hyphens and capitals; one id has one spelling.
                if hex.len() != 32 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                    return Err(error());
                }
                Uuid::try_parse(hex).map(Self).map_err(|_| error())
            }
        }

        serde_as_text!($name);
    };
}

macro_rules! serde_as_text {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

time_sortable_id!(
    /// `job_…`
    JobId,
    "job",
    "job_"
);
time_sortable_id!(
    /// `ds_…`
    DatasetId,
    "dataset",
    "ds_"
);
time_sortable_id!(
    /// `key_…`
    KeyId,
    "key",
    "key_"
);

time_sortable_id!(
    /// `wh_…`
    WebhookId,
    "webhook",
    "wh_"
);
time_sortable_id!(
    /// `msg_…`
    MessageId,
    "message",
    "msg_"
);

/// A model's slug, e.g. `demo-icons`: 1 to 64 of `a-z 0-9 . _ -`, starting with a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId(String);

impl ModelId {
    /// The slug.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ModelId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let fits = (1..=64).contains(&text.len())
            && text.bytes().next().is_some_and(alphanumeric)
            && text.bytes().all(|b| alphanumeric(b) || matches!(b, b'.' | b'_' | b'-'));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError {
                kind: "model",
                expected: "expected 1 to 64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit",
                text: text.chars().take(64).collect(),
            })
        }
    }
}

serde_as_text!(ModelId);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_text_and_sort_by_time() {
        let ids: Vec<JobId> = (0..1000).map(|_| JobId::new()).collect();
        assert!(ids.is_sorted() && ids.windows(2).all(|pair| pair[0] != pair[1]));
        for id in ids {
            assert_eq!(id.to_string().parse::<JobId>().unwrap(), id);
            assert_eq!(
                serde_json::from_str::<JobId>(&serde_json::to_string(&id).unwrap()).unwrap(),
                id
            );
        }
    }

    #[test]
    fn one_id_has_one_spelling() {
        let good = JobId::new().to_string();
        for bad in [
            good.to_uppercase(),
            good.replace("job_", "ds_"),
            good.replace("job_", ""),
            format!("{good}0"),
            good[..good.len() - 1].to_owned(),
            "job_019000000000-7000-8000-000000000000".to_owned(),
            "job_../../../../../../../../etc/passwd0".to_owned(),
            String::new(),
        ] {
            assert!(bad.parse::<JobId>().is_err(), "{bad} parsed");
        }
    }

    #[test]
    fn model_slugs_cannot_be_paths() {
        assert!("demo-icons".parse::<ModelId>().is_ok());
        for bad in ["", ".hidden", "..", "a/b", "Demo", "a b", &"a".repeat(65)] {
            assert!(bad.parse::<ModelId>().is_err(), "{bad} parsed");
        }
    }
}
