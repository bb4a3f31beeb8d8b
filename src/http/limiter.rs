//! How often somebody may ask: a bucket of tokens for each key, or for each address without one. In memory, so a restart
//! forgets; what it protects from is haste. (The `governor` crate would do this too, with nine more crates for forty lines.)

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::Instant,
};

use axum::http::{HeaderName, HeaderValue};

use crate::domain::KeyId;

/// Buckets kept; beyond it full ones are dropped, which changes nothing for their owners.
const MAX_BUCKETS: usize = 10_000;
const MINUTE_S: f64 = 60.0;

/// Whose bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Who {
    Key(KeyId),
    Address(IpAddr),
    /// Requests of this address that show no valid key.
    Guesses(IpAddr),
}

impl Who {
    /// An IPv6 customer has a whole /64, so that is what counts as one address.
    pub(super) fn address(address: IpAddr) -> Self {
        Self::Address(customer(address))
    }

    /// As [`Who::address`], for requests without a valid key.
    pub(super) fn guesses(address: IpAddr) -> Self {
        Self::Guesses(customer(address))
    }
}

fn customer(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (!0 << 64))),
    }
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
    per_minute: f64,
}

impl Bucket {
    fn fill(&mut self, now: Instant) {
        let gone = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + gone * self.per_minute / MINUTE_S).min(self.per_minute);
        self.at = now;
    }
}

/// All buckets.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    buckets: Mutex<HashMap<Who, Bucket>>,
}

/// What a request may know of its bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) allowed: bool,
    limit: u32,
    remaining: u32,
    /// Until the bucket is full again.
    reset_s: u32,
    /// Until the next token, for who was refused.
    pub(super) retry_after_s: u32,
}

impl Limiter {
    /// Takes a token out of the bucket of `who`, which holds `per_minute` and is filled at that pace.
    pub(super) fn take(&self, who: Who, per_minute: u32, now: Instant) -> Verdict {
        let limit = f64::from(per_minute);
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_BUCKETS && !buckets.contains_key(&who) {
            buckets.retain(|_, bucket| {
                bucket.fill(now);
                bucket.tokens < bucket.per_minute
            });
        }
        let bucket = buckets.entry(who).or_insert(Bucket {
            tokens: limit,
            at: now,
            per_minute: limit,
        });
        bucket.per_minute = limit;
        bucket.fill(now);
        let allowed = bucket.tokens >= 1.0;
        if allowed {
            bucket.tokens -= 1.0;
        }
        #[expect(clippy::cast_possible_truncation, reason = "between 0 and a u32")]
        let whole = |x: f64| x.max(0.0) as u32;
        let seconds = |missing: f64| whole((missing * MINUTE_S / limit).ceil());
        Verdict {
            allowed,
            limit: per_minute,
            remaining: whole(bucket.tokens.floor()),
            reset_s: seconds(limit - bucket.tokens),
            retry_after_s: seconds(1.0 - bucket.tokens).max(1),
        }
    }
}

impl Verdict {
    /// `RateLimit-Limit`, `-Remaining` and `-Reset` (draft-ietf-httpapi-ratelimit-headers-03, which clients know).
    pub(super) fn headers(self) -> [(HeaderName, HeaderValue); 3] {
        [
            (HeaderName::from_static("ratelimit-limit"), self.limit.into()),
            (HeaderName::from_static("ratelimit-remaining"), self.remaining.into()),
            (HeaderName::from_static("ratelimit-reset"), self.reset_s.into()),
        ]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_bucket_empties_and_fills_at_its_pace_and_nobody_pays_for_another() {
        let limiter = Limiter::default();
        let (a, b) = (Who::Key(KeyId::new()), Who::address("192.0.2.1".parse().unwrap()));
        let start = Instant::now();
        for left in (0..3).rev() {
            let verdict = limiter.take(a, 3, start);
            assert!(verdict.allowed);
            assert_eq!(verdict.remaining, left);
        }
        let refused = limiter.take(a, 3, start);
        assert_eq!(
            (refused.allowed, refused.retry_after_s, refused.reset_s),
            (false, 20, 60)
        );
        assert!(limiter.take(b, 3, start).allowed, "another's bucket");
        assert!(!limiter.take(a, 3, start + Duration::from_secs(19)).allowed);
        assert!(limiter.take(a, 3, start + Duration::from_secs(21)).allowed);
        assert!(!limiter.take(a, 3, start + Duration::from_secs(21)).allowed);
        let later = start + Duration::from_secs(3600);
        assert_eq!(limiter.take(a, 3, later).remaining, 2, "no more than full");
        assert_eq!(limiter.take(a, 100, later).limit, 100, "a new limit counts at once");
    }

    #[test]
    fn a_v6_customer_is_one_and_buckets_do_not_pile_up() {
        let limiter = Limiter::default();
        let start = Instant::now();
        let v6 = |n: u128| Who::address(IpAddr::V6(Ipv6Addr::from_bits((0x2001_0db8_u128 << 96) | n)));
        assert_eq!(v6(1), v6(u128::from(u64::MAX)));
        assert_ne!(v6(1), v6(1 << 64));
        for n in 0..20_000u32 {
            let at = start + Duration::from_secs(u64::from(n));
            limiter.take(Who::address(IpAddr::V4(n.into())), 60, at);
        }
        assert!(limiter.buckets.lock().unwrap().len() <= MAX_BUCKETS);
    }
}
