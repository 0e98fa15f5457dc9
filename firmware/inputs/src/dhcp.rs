//! DHCP options that the TCP/IP stack leaves to its user: MTU and classless static routes.

use alloc::vec::Vec;

/// Option code of the interface MTU (RFC 2132, section 5.1).
pub const OPTION_MTU: u8 = 26;
/// Option code of classless static routes (RFC 3442).
pub const OPTION_CLASSLESS_ROUTES: u8 = 121;
/// Most routes taken from one lease.
pub const ROUTES_MAX: usize = 6;

/// One route of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination network.
    pub network: [u8; 4],
    /// Its prefix length.
    pub prefix: u8,
    /// Next hop; all zeros means on the link.
    pub via: [u8; 4],
}

/// The MTU of an option's data.
#[must_use]
pub fn mtu(data: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(data.try_into().ok()?))
}

/// The routes of an option's data, at most [`ROUTES_MAX`]; none where it is malformed.
#[must_use]
pub fn classless_routes(mut data: &[u8]) -> Vec<Route> {
    let mut routes = Vec::new();
    while let Some((&prefix, rest)) = data.split_first() {
        let significant = usize::from(prefix).div_ceil(8);
        if prefix > 32 || rest.len() < significant + 4 {
            return Vec::new();
        }
        let mut network = [0; 4];
        network[..significant].copy_from_slice(&rest[..significant]);
        let via = [
            rest[significant],
            rest[significant + 1],
            rest[significant + 2],
            rest[significant + 3],
        ];
        if routes.len() < ROUTES_MAX {
            routes.push(Route { network, prefix, via });
        }
        data = &rest[significant + 4..];
    }
    routes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_read_with_as_many_octets_as_their_prefix_needs() {
        let data =
            [32, 169, 254, 169, 254, 10, 0, 0, 2, 0, 10, 0, 0, 1, 20, 172, 16, 16, 0, 0, 0, 0];
        let routes = classless_routes(&data);
        assert_eq!(
            routes,
            [
                Route { network: [169, 254, 169, 254], prefix: 32, via: [10, 0, 0, 2] },
                Route { network: [0; 4], prefix: 0, via: [10, 0, 0, 1] },
                Route { network: [172, 16, 16, 0], prefix: 20, via: [0; 4] },
            ]
        );
    }

    #[test]
    fn malformed_options_give_nothing() {
        assert!(classless_routes(&[33, 1, 2, 3, 4, 5, 1, 1, 1, 1]).is_empty());
        assert!(classless_routes(&[24, 10, 0, 0, 10, 0, 0]).is_empty());
        assert_eq!(classless_routes(&[0, 1, 1, 1, 1].repeat(50)).len(), ROUTES_MAX);
        assert_eq!(mtu(&[5, 0xDC]), Some(1500));
        assert_eq!(mtu(&[5]), None);
    }
}
