//! IP protocol names of security group rules (Neutron's list, IANA's numbers).

const NAMES: &[(&str, u8)] = &[
    ("icmp", 1),
    ("igmp", 2),
    ("ipip", 4),
    ("tcp", 6),
    ("egp", 8),
    ("udp", 17),
    ("dccp", 33),
    ("ipv6-encap", 41),
    ("ipv6-route", 43),
    ("ipv6-frag", 44),
    ("rsvp", 46),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", 58),
    ("icmpv6", 58),
    ("ipv6-nonxt", 59),
    ("ipv6-opts", 60),
    ("ospf", 89),
    ("vrrp", 112),
    ("pgm", 113),
    ("sctp", 132),
    ("udplite", 136),
];

/// The protocol's number, by name or as digits; `icmp` in an IPv6 rule means ICMPv6.
pub fn number(name: &str, ipv6: bool) -> Option<u8> {
    if ipv6 && (name == "icmp" || name == "1") {
        return Some(58);
    }
    let named = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    named.or_else(|| name.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn knows_names_numbers_and_the_meaning_of_icmp() {
        assert_eq!(number("tcp", false), Some(6));
        assert_eq!(number("132", false), Some(132));
        assert_eq!(number("icmp", false), Some(1));
        assert_eq!(number("icmp", true), Some(58));
        assert_eq!(number("nonsense", false), None);
        assert_eq!(number("256", false), None);
    }
}
