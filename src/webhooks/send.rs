//! One attempt: signs, connects where the policy lets it, follows nothing, reads no answer beyond its status.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hmac::{Hmac, KeyInit as _, Mac as _};
use reqwest::redirect;
use sha2::Sha256;

use super::policy::{Guarded, Lookup, Policy, System};
use crate::{
    domain::{Delivery, DeliveryAttempt, Webhook, now_ms},
    secret,
};

/// What every secret starts with.
const SECRET_MARK: &str = "whsec_";
/// Bytes of a secret, as the standard asks.
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// A new random secret.
///
/// # Errors
/// If the system gives no random numbers.
pub fn new_secret() -> Result<String, getrandom::Error> {
    let bytes: [u8; 32] = secret::random_bytes()?;
    Ok(format!("{SECRET_MARK}{}", BASE64.encode(bytes)))
}

/// The bytes of a secret, if it is one: `whsec_` and 24 to 64 bytes in base64.
pub fn secret_bytes(text: &str) -> Option<Vec<u8>> {
    let bytes = BASE64.decode(text.strip_prefix(SECRET_MARK)?).ok()?;
    SECRET_BYTES.contains(&bytes.len()).then_some(bytes)
}

/// `webhook-signature` of a message.
///
/// # Source
/// Standard Webhooks 1.0.0: `v1,` and base64 of HMAC-SHA256 over `{id}.{timestamp}.{payload}`.
fn signature(secret: &[u8], id: &str, timestamp_s: i64, payload: &str) -> Option<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).ok()?;
    mac.update(format!("{id}.{timestamp_s}.{payload}").as_bytes());
    Some(format!("v1,{}", BASE64.encode(mac.finalize().into_bytes())))
}

/// Sends.
#[derive(Debug, Clone)]
pub struct Sender {
    http: reqwest::Client,
    policy: Arc<Policy>,
}

impl Sender {
    /// With the system's resolver.
    ///
    /// # Errors
    /// If the client cannot be made. Without certificates on the machine it is made, and trusts nobody.
    pub fn new(policy: Policy, timeout: Duration) -> reqwest::Result<Self> {
        Self::with(policy, timeout, Arc::new(System))
    }

    pub(super) fn with(policy: Policy, timeout: Duration, lookup: Arc<dyn Lookup>) -> reqwest::Result<Self> {
        let policy = Arc::new(policy);
        let resolver = Arc::new(Guarded {
            policy: Arc::clone(&policy),
            lookup,
        });
        let builder = || {
            reqwest::Client::builder()
                .user_agent(concat!("lorad/", env!("CARGO_PKG_VERSION")))
                .timeout(timeout)
                .redirect(redirect::Policy::none())
                .dns_resolver(Arc::clone(&resolver))
                // A proxy would connect in our place, past the policy; a kept connection was checked too long ago.
                .no_proxy()
                .pool_max_idle_per_host(0)
        };
        let http = builder().build().or_else(|error| {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no certificates on this machine (ca-certificates): webhooks over https will fail"
            );
            builder().tls_certs_only([]).build()
        })?;
        Ok(Self { http, policy })
    }

    /// One attempt.
    pub async fn attempt(&self, webhook: &Webhook, delivery: &Delivery) -> DeliveryAttempt {
        let (t_ms, started) = (now_ms(), Instant::now());
        let answer = self.post(webhook, delivery, t_ms / 1000).await;
        let (http_status, error) = match answer {
            Ok(status) if (200..300).contains(&status) => (Some(status), None),
            Ok(status) if (300..400).contains(&status) => (
                Some(status),
                Some(format!("answered {status}; redirects are not followed")),
            ),
            Ok(status) => (Some(status), Some(format!("answered {status}"))),
            Err(error) => (None, Some(error)),
        };
        DeliveryAttempt {
            t_ms,
            duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            http_status,
            error,
        }
    }

    async fn post(&self, webhook: &Webhook, delivery: &Delivery, timestamp_s: i64) -> Result<u16, String> {
        let url = self.policy.check(&webhook.url).map_err(|refusal| refusal.to_string())?;
        let id = delivery.id.to_string();
        let signature = secret_bytes(&webhook.secret)
            .and_then(|secret| signature(&secret, &id, timestamp_s, &delivery.payload))
            .ok_or("the webhook's secret is damaged")?;
        let request = self
            .http
            .post(url)
            .header("content-type", "application/json")
            .header("webhook-id", id)
            .header("webhook-timestamp", timestamp_s)
            .header("webhook-signature", signature)
            .body(delivery.payload.clone());
        match request.send().await {
            Ok(answer) => Ok(answer.status().as_u16()),
            Err(error) => Err(told(&error)),
        }
    }
}

/// The causes of an error, from the outside in, without the address: it may hold a token.
fn told(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    let mut text = String::from(if error.is_connect() {
        "cannot connect"
    } else {
        "the request failed"
    });
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        // Layers that only repeat the layer below.
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text.chars().take(500).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr},
        sync::atomic::{AtomicUsize, Ordering},
    };

    use futures_util::future::BoxFuture;

    use super::*;
    use crate::domain::{DeliveryStatus, MessageId, WebhookEvent, WebhookId};

    #[test]
    fn the_signature_is_the_one_of_the_standards_own_example() {
        let secret = secret_bytes("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        assert_eq!(
            signature(
                &secret,
                "msg_p5jXN8AQM9LWM0D4loKWxJek",
                1_614_265_330,
                r#"{"test": 2432232314}"#
            )
            .unwrap(),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
    }

    #[test]
    fn secrets_are_read_back_and_short_ones_refused() {
        assert_eq!(secret_bytes(&new_secret().unwrap()).unwrap().len(), 32);
        for bad in [
            "",
            "whsec_",
            "whsec_c2hvcnQ=",
            "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "whsec_not base64!",
        ] {
            assert!(secret_bytes(bad).is_none(), "{bad}");
        }
    }

    /// A name that was public when somebody looked, and leads home when it is called.
    struct Rebinding(AtomicUsize);

    impl Lookup for Rebinding {
        fn lookup(&self, _: String) -> BoxFuture<'static, std::io::Result<Vec<IpAddr>>> {
            let n = self.0.fetch_add(1, Ordering::SeqCst);
            let public = IpAddr::V4(Ipv4Addr::new(203, 0, 114, 1));
            let answer = if n == 0 { public } else { Ipv4Addr::LOCALHOST.into() };
            Box::pin(async move { Ok(vec![answer]) })
        }
    }

    #[tokio::test]
    async fn a_name_that_changes_its_mind_reaches_nothing_private() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let policy = Policy {
            allow_http: true,
            ..Policy::default()
        };
        let resolver = Arc::new(Rebinding(AtomicUsize::new(0)));
        let first = resolver.lookup(String::new()).await.unwrap();
        assert!(policy.check_address(first[0]).is_ok(), "the first answer is public");
        let sender = Sender::with(policy, Duration::from_secs(60), resolver).unwrap();
        let webhook = Webhook {
            id: WebhookId::new(),
            job_id: None,
            url: format!("http://rebinding.example:{port}/"),
            events: vec![WebhookEvent::Test],
            secret: new_secret().unwrap(),
            description: String::new(),
            enabled: true,
            disabled_reason: None,
            failing_since_ms: None,
            created_at_ms: 0,
        };
        let delivery = Delivery {
            id: MessageId::new(),
            webhook_id: webhook.id,
            event: "webhook.test".to_owned(),
            payload: "{}".to_owned(),
            status: DeliveryStatus::Pending,
            tries: 0,
            next_attempt_ms: Some(0),
            created_at_ms: 0,
            attempts: Vec::new(),
        };
        let attempt = sender.attempt(&webhook, &delivery).await;
        let error = attempt.error.unwrap();
        assert!(error.contains("127.0.0.1, which is not public"), "{error}");
        let knock = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
        assert!(knock.is_err(), "somebody connected");
    }
}
