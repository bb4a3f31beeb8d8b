//! Networks of addresses: which proxies are believed, and which private places webhooks may reach.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A list of networks, spelt `10.0.0.0/8`, `fd00::/8` or as one address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Networks(Vec<IpNet>);

impl Networks {
    /// Whether one of them holds the address. An IPv4 address in IPv6 clothes (`::ffff:10.0.0.1`) is the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }
}

impl TryFrom<Vec<String>> for Networks {
    type Error = String;

    fn try_from(texts: Vec<String>) -> Result<Self, String> {
        let network = |text: &String| {
            let text = text.trim();
            text.parse::<IpNet>()
                .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
                .map_err(|_| format!("{text:?} is no network; write 10.0.0.0/8, fd00::/8 or an address"))
        };
        texts.iter().map(network).collect::<Result<_, _>>().map(Self)
    }
}

impl From<Networks> for Vec<String> {
    fn from(networks: Networks) -> Self {
        networks.0.iter().map(ToString::to_string).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_read_as_prefix_or_address_and_nothing_else() {
        let networks = Networks::try_from(vec!["10.0.0.0/8".to_owned(), " ::1 ".to_owned()]).unwrap();
        for (address, inside) in [
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("::1", true),
            ("11.0.0.1", false),
            ("::2", false),
        ] {
            assert_eq!(networks.contains(address.parse().unwrap()), inside, "{address}");
        }
        assert!(
            Networks::try_from(vec!["10.0.0.0/33".to_owned()])
                .unwrap_err()
                .contains("10.0.0.0/33")
        );
        assert!(Networks::try_from(vec!["localhost".to_owned()]).is_err());
    }
}
