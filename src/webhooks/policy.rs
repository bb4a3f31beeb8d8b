//! Where webhooks may go. Checked when the connection is made, not only when the address is written down: a name can mean
//! something else by then.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use futures_util::future::BoxFuture;
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};

use crate::network::Networks;

/// What is allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// Networks that may be reached though they are not public.
    pub allow_private: Networks,
    /// Whether unencrypted `http` is allowed.
    pub allow_http: bool,
}

/// Why an address is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No address at all.
    #[error("not an address like https://example.com/hook")]
    Malformed,
    /// Neither https nor an allowed http.
    #[error("must begin with https:// (webhooks.allow_http in the settings allows http)")]
    Scheme,
    /// Name or password in the address.
    #[error("must not carry a name or password")]
    UserInfo,
    /// It leads into a network that is not public.
    #[error("leads to {0}, which is not public; webhooks.allow_private in the settings can allow its network")]
    Address(IpAddr),
}

impl Policy {
    /// The parsed address, if it can be called as far as the text alone tells.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn check(&self, text: &str) -> Result<Url, Refusal> {
        let url = Url::parse(text).map_err(|_| Refusal::Malformed)?;
        match url.scheme() {
            "https" => {}
            "http" if self.allow_http => {}
            _ => return Err(Refusal::Scheme),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Refusal::UserInfo);
        }
        // The parser has already turned 2130706433, 0x7f.1 and the like into 127.0.0.1.
        let host = url.host_str().ok_or(Refusal::Malformed)?;
        if let Ok(address) = host.trim_matches(['[', ']']).parse() {
            self.check_address(address)?;
        }
        Ok(url)
    }

    /// Whether a connection to this address may be made.
    ///
    /// # Errors
    /// If it may not.
    pub fn check_address(&self, address: IpAddr) -> Result<(), Refusal> {
        if is_public(address) || self.allow_private.contains(address) {
            Ok(())
        } else {
            Err(Refusal::Address(address))
        }
    }
}

/// Whether an address belongs to the public internet.
///
/// # Source
/// The IANA special-purpose address registries (RFC 6890 and its updates). The standard library's `is_global` is unstable.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(a == 0
        || address.is_private()
        || address.is_loopback()
        || address.is_link_local() // also the clouds' metadata, 169.254.169.254
        || address.is_documentation()
        || (a == 100 && (64..128).contains(&b)) // carrier-grade NAT
        || (a == 192 && b == 0 && c == 0) // protocol assignments
        || (a == 192 && b == 88 && c == 99) // 6to4 relays
        || (a == 198 && (18..20).contains(&b)) // benchmarks
        || a >= 224) // multicast, reserved, broadcast
}

/// Of IPv6 only 2000::/3 is assigned to the public; within it, what carries or translates to IPv4 is refused as a whole.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, ..] = address.segments();
    a & 0xe000 == 0x2000
        && !(a == 0x2001 && b < 0x0200) // protocol assignments, Teredo, benchmarks, ORCHID
        && !(a == 0x2001 && b == 0x0db8) // documentation
        && a != 0x2002 // 6to4
        && !(a == 0x3fff && b < 0x1000) // documentation
}

/// Turns names into addresses.
pub(super) trait Lookup: Send + Sync + 'static {
    /// Every address of a name.
    fn lookup(&self, name: String) -> BoxFuture<'static, std::io::Result<Vec<IpAddr>>>;
}

/// The system's resolver.
pub(super) struct System;

impl Lookup for System {
    fn lookup(&self, name: String) -> BoxFuture<'static, std::io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            Ok(tokio::net::lookup_host((name, 0))
                .await?
                .map(|found| found.ip())
                .collect())
        })
    }
}

/// The resolver of the client: hands out only addresses that may be connected to. The client connects to what it gets from
/// here and asks nobody else, so there is no moment between check and use.
pub(super) struct Guarded {
    pub(super) policy: Arc<Policy>,
    pub(super) lookup: Arc<dyn Lookup>,
}

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = Arc::clone(&self.policy);
        let found = self.lookup.lookup(name.as_str().to_owned());
        Box::pin(async move {
            let mut refused = None;
            let mut allowed = Vec::new();
            for address in found.await? {
                match policy.check_address(address) {
                    Ok(()) => allowed.push(SocketAddr::new(address, 0)),
                    Err(refusal) => refused = Some(refusal),
                }
            }
            match refused {
                Some(refusal) if allowed.is_empty() => Err(refusal.into()),
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_public() {
        for public in [
            "1.1.1.1",
            "8.8.8.8",
            "172.32.0.1",
            "192.0.1.1",
            "2606:4700::1111",
            "2a00::1",
            "2001:4860::8888",
        ] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for private in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
    }

    #[test]
    fn an_address_is_read_as_the_connection_would_read_it() {
        let policy = Policy {
            allow_http: true,
            ..Policy::default()
        };
        for text in [
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://127.1/",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:7f00:1]/",
            "http://169.254.169.254/latest/meta-data/",
            "http://\u{ff11}\u{ff12}\u{ff17}.0.0.1/",
            "http://0/",
        ] {
            assert!(
                matches!(policy.check(text), Err(Refusal::Address(_))),
                "{text}: {:?}",
                policy.check(text)
            );
        }
        assert_eq!(policy.check("https://a:b@example.com/"), Err(Refusal::UserInfo));
        for text in ["file:///etc/passwd", "gopher://example.com/", "ftp://example.com"] {
            assert_eq!(policy.check(text), Err(Refusal::Scheme), "{text}");
        }
        assert_eq!(policy.check("example.com/hook"), Err(Refusal::Malformed));
        assert!(policy.check("https://example.com:8443/hook?x=1").is_ok());
        assert_eq!(Policy::default().check("http://example.com/"), Err(Refusal::Scheme));
        let lan = Policy {
            allow_private: Networks::try_from(vec!["10.0.0.0/8".to_owned()]).unwrap(),
            allow_http: true,
        };
        assert!(lan.check("http://10.1.2.3/").is_ok());
        assert_eq!(
            lan.check("http://127.0.0.1/"),
            Err(Refusal::Address(Ipv4Addr::LOCALHOST.into()))
        );
    }
}
