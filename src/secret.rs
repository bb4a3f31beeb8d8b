//! Random secrets: API keys, session cookies. How they are spelt, hashed and compared.
//!
//! Whoever holds a secret needs no more proof, so only its SHA-256 is stored. That is enough because a secret has 256 random
//! bits: slow password hashes protect guessable words, and would only make every request slow.

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// What every API key starts with, so that scanners find one that leaked.
const KEY_MARK: &str = "lorad_";
/// Hex digits after the mark that find the key's row and are shown to people.
const LOOKUP_DIGITS: usize = 8;
const SECRET_DIGITS: usize = 64;
const CHECK_DIGITS: usize = 8;

/// `N` random bytes from the system.
///
/// # Errors
/// If the system gives none.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// `N` random bytes from the system, as lower-case hex.
///
/// # Errors
/// If the system gives no random numbers.
pub fn random_hex<const N: usize>() -> Result<String, getrandom::Error> {
    Ok(hex::encode(random_bytes::<N>()?))
}

/// SHA-256 as lower-case hex.
pub fn sha256_hex(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

/// Whether two texts are equal, in a time that does not depend on where they differ.
pub fn same(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

/// An API key in full: `lorad_`, 8 hex digits that find it, 64 secret ones, and 8 of the SHA-256 of all before them. With the
/// mark and the checksum, `lorad_[0-9a-f]{80}` found in a log or a repository is a key and not a coincidence.
#[derive(Clone)]
pub struct Key(String);

impl Key {
    /// A new random key.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        let body = format!(
            "{KEY_MARK}{}{}",
            random_hex::<{ LOOKUP_DIGITS / 2 }>()?,
            random_hex::<{ SECRET_DIGITS / 2 }>()?
        );
        let check = checksum(&body);
        Ok(Self(body + &check))
    }

    /// The key, if the text is spelt like one.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(KEY_MARK)?;
        let is_hex = digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if digits.len() != LOOKUP_DIGITS + SECRET_DIGITS + CHECK_DIGITS || !is_hex {
            return None;
        }
        let (body, check) = text.split_at(text.len() - CHECK_DIGITS);
        (checksum(body) == check).then(|| Self(text.to_owned()))
    }

    /// The first characters, which are no secret.
    pub fn prefix(&self) -> &str {
        &self.0[..KEY_MARK.len() + LOOKUP_DIGITS]
    }

    /// What is stored of it.
    pub fn sha256(&self) -> String {
        sha256_hex(&self.0)
    }

    /// The whole key, to be shown once.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// Without the secret: keys must not get into logs.
impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}…", self.prefix())
    }
}

fn checksum(body: &str) -> String {
    sha256_hex(body)[..CHECK_DIGITS].to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_back_and_no_two_are_equal() {
        let (a, b) = (Key::random().unwrap(), Key::random().unwrap());
        assert_eq!(Key::parse(a.reveal()).unwrap().sha256(), a.sha256());
        assert_ne!(a.reveal(), b.reveal());
        assert_eq!(a.reveal().len(), 86);
        assert!(a.reveal().starts_with(a.prefix()));
        assert!(
            !format!("{a:?}").contains(&a.reveal()[14..]),
            "a secret in debug output"
        );
    }

    #[test]
    fn a_mistyped_key_is_recognised_without_looking_it_up() {
        let key = Key::random().unwrap();
        let good = key.reveal();
        let other_digit = if good.ends_with('0') { "1" } else { "0" };
        for bad in [
            String::new(),
            good.to_uppercase(),
            good.replace("lorad_", "lorad-"),
            good[..good.len() - 1].to_owned(),
            format!("{good}0"),
            format!("{}{other_digit}", &good[..good.len() - 1]),
            format!("{}é", &good[..good.len() - 2]),
        ] {
            assert!(Key::parse(&bad).is_none(), "{bad}");
        }
    }
}
