//! Addresses are unique: in a subnet, and MAC addresses in a network. Counted from the objects,
//! not from the indexes that `apply` keeps.

use std::collections::BTreeSet;

use controller::state::State;

/// Whether every address is given out once.
pub(super) fn unique(state: &State) -> Result<(), String> {
    let mut given = BTreeSet::new();
    let mut macs = BTreeSet::new();
    for port in state.network.ports.values() {
        for fixed in &port.fixed_ips {
            if !given.insert((&fixed.subnet_id, fixed.ip_address)) {
                return Err(format!("{} is given out twice", fixed.ip_address));
            }
        }
        if !macs.insert((&port.network_id, &port.mac_address)) {
            return Err(format!("{} is given out twice", port.mac_address));
        }
    }
    for floating in state.network.floating_ips.values() {
        if !given.insert((&floating.subnet_id, floating.floating_ip_address)) {
            return Err(format!("{} is given out twice", floating.floating_ip_address));
        }
    }
    Ok(())
}
