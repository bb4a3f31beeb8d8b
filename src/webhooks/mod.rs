//! Webhooks: sends what the store's outbox holds, until the receiver took it or the schedule ends.
//!
//! At least once: an event is in the outbox before anybody can see the change that it tells of, and leaves it only with a
//! 2xx answer; after a crash in between it is sent again, under the same `webhook-id`. Signed as Standard Webhooks says.
//! Knows no routes. Started by `serve`.

mod policy;
mod send;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{task::JoinSet, time::MissedTickBehavior};

pub use policy::{Policy, Refusal};
pub use send::{Sender, new_secret, secret_bytes};

use crate::{
    app::App,
    config,
    domain::{Delivery, DeliveryAttempt, MessageId, RetrySchedule, Webhook, WebhookId, now_ms},
    store::StoreError,
};

/// Attempts at the same time, and to one receiver: one that is slow must not hold up the others.
const AT_ONCE: usize = 32;
const AT_ONCE_PER_WEBHOOK: u32 = 4;
const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// Pause between two rounds of dropping old log entries.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

impl From<&config::Webhooks> for Policy {
    fn from(settings: &config::Webhooks) -> Self {
        Self {
            allow_private: settings.allow_private.clone(),
            allow_http: settings.allow_http,
        }
    }
}

/// The sending task.
#[derive(Debug)]
pub struct Webhooks {
    app: App,
    sender: Sender,
    schedule: RetrySchedule,
    in_flight: HashSet<MessageId>,
    to: HashMap<WebhookId, u32>,
    running: JoinSet<(Delivery, Arc<Webhook>, DeliveryAttempt)>,
}

impl Webhooks {
    /// Ready to [`run`](Self::run).
    ///
    /// # Errors
    /// See [`Sender::new`].
    pub fn new(app: App) -> reqwest::Result<Self> {
        let settings = &app.config.webhooks;
        let days = i64::try_from(settings.disable_after_days).unwrap_or(i64::MAX);
        Ok(Self {
            sender: Sender::new(settings.into(), Duration::from_millis(settings.timeout_ms))?,
            schedule: RetrySchedule {
                pauses_ms: settings.retry_after_ms.clone(),
                disable_after_ms: days.saturating_mul(DAY_MS),
            },
            in_flight: HashSet::new(),
            to: HashMap::new(),
            running: JoinSet::new(),
            app,
        })
    }

    /// Sends until the server shuts down. What is on its way then is not waited for: it is sent again.
    pub async fn run(mut self) {
        let every = Duration::from_millis(self.app.config.webhooks.poll_ms);
        let mut beat = tokio::time::interval(every);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut prune = tokio::time::interval(PRUNE_EVERY);
        let shutdown = self.app.shutdown.clone();
        loop {
            let done = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Some(ended) = self.running.join_next() => match ended {
                    Ok((delivery, webhook, attempt)) => self.settle(&delivery, &webhook, &attempt).await,
                    Err(error) => {
                        tracing::error!(%error, "an attempt to deliver broke");
                        Ok(())
                    }
                },
                _ = prune.tick() => self.prune().await,
                _ = beat.tick() => self.start_due().await,
            };
            if let Err(error) = done {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "webhooks wait for the database"
                );
            }
        }
    }

    async fn start_due(&mut self) -> Result<(), StoreError> {
        for (delivery, webhook) in self.app.store.due_deliveries(now_ms(), AT_ONCE_PER_WEBHOOK).await? {
            let to = self.to.entry(webhook.id).or_default();
            let is_free = self.running.len() < AT_ONCE && *to < AT_ONCE_PER_WEBHOOK;
            if !is_free || !self.in_flight.insert(delivery.id) {
                continue;
            }
            *to += 1;
            let (sender, webhook) = (self.sender.clone(), Arc::new(webhook));
            self.running.spawn(async move {
                let attempt = sender.attempt(&webhook, &delivery).await;
                (delivery, webhook, attempt)
            });
        }
        Ok(())
    }

    async fn settle(
        &mut self,
        delivery: &Delivery,
        webhook: &Webhook,
        attempt: &DeliveryAttempt,
    ) -> Result<(), StoreError> {
        self.in_flight.remove(&delivery.id);
        if let Some(to) = self.to.get_mut(&webhook.id) {
            *to -= 1;
            if *to == 0 {
                self.to.remove(&webhook.id);
            }
        }
        let after = self
            .schedule
            .after(attempt, delivery.tries + 1, webhook.failing_since_ms);
        tracing::debug!(webhook.id = %webhook.id, delivery.id = %delivery.id, ?attempt, ?after, "delivered or not");
        self.app.store.record_delivery(delivery, attempt, &after).await
    }

    async fn prune(&mut self) -> Result<(), StoreError> {
        let days = i64::try_from(self.app.config.webhooks.keep_days).unwrap_or(i64::MAX);
        let before = now_ms().saturating_sub(days.saturating_mul(DAY_MS));
        self.app.store.prune_deliveries(before).await
    }
}
