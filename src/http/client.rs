//! Where a request comes from: the peer of its connection, or whom a trusted proxy names.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use axum::http::{HeaderMap, HeaderName, request::Parts};

use crate::network::Networks;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The other end of the connection; an extension of every request, set by [`super::listen`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

/// The client's address.
pub(super) fn address(request: &Parts, trusted: &Networks) -> IpAddr {
    let peer = request
        .extensions
        .get::<Peer>()
        .map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.0.ip().to_canonical());
    behind_proxies(peer, &request.headers, trusted)
}

/// Follows `X-Forwarded-For` from its end, where the nearest proxy writes, for as long as the one who wrote is trusted. What
/// stands further to the front was sent by the client and proves nothing.
fn behind_proxies(peer: IpAddr, headers: &HeaderMap, trusted: &Networks) -> IpAddr {
    let hops: Vec<&str> = headers
        .get_all(X_FORWARDED_FOR)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(','))
        .map(str::trim)
        .collect();
    let mut client = peer;
    for hop in hops.into_iter().rev() {
        if !trusted.contains(client) {
            break;
        }
        match hop.parse::<IpAddr>() {
            Ok(address) => client = address.to_canonical(),
            Err(_) => break,
        }
    }
    client
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_trusted_proxies_wrote_is_believed() {
        let trusted = Networks::try_from(vec!["127.0.0.1".to_owned(), "10.0.0.0/8".to_owned()]).unwrap();
        let client = |peer: &str, forwarded: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(X_FORWARDED_FOR, forwarded.parse().unwrap());
            behind_proxies(peer.parse().unwrap(), &headers, &trusted).to_string()
        };
        assert_eq!(client("192.0.2.9", "1.1.1.1"), "192.0.2.9", "the peer is no proxy");
        assert_eq!(client("127.0.0.1", "198.51.100.7"), "198.51.100.7");
        assert_eq!(
            client("127.0.0.1", "6.6.6.6, 198.51.100.7, 10.0.0.2"),
            "198.51.100.7",
            "6.6.6.6 is made up"
        );
        assert_eq!(client("127.0.0.1", "nonsense"), "127.0.0.1");
        assert_eq!(client("127.0.0.1", "::ffff:9.9.9.9"), "9.9.9.9");
    }
}
