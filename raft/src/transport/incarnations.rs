//! Which directory each peer must run on: a node that was wiped and returns under its old identity
//! is refused by everybody, because it has forgotten what it voted for and acknowledged.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use crate::{NodeId, types::Incarnation};

/// What a process without a directory says: it may call, and nothing else.
pub(crate) const NONE: Incarnation = [0; 16];

/// Our own incarnation and those that the membership names.
pub(crate) struct Incarnations {
    pub(crate) own: Incarnation,
    expected: Mutex<HashMap<NodeId, Incarnation>>,
}

impl Incarnations {
    pub(crate) fn new(own: Incarnation) -> Self {
        Self { own, expected: Mutex::default() }
    }

    /// Remembers what the membership says of a node.
    pub(crate) fn expect(&self, node: NodeId, incarnation: Incarnation) {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).insert(node, incarnation);
    }

    /// Forgets who is no member any more.
    pub(crate) fn replace(&self, members: HashMap<NodeId, Incarnation>) {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = members;
    }

    /// Refuses a node on another directory than it was added with.
    pub(crate) fn check(&self, node: NodeId, found: Incarnation) -> Result<(), String> {
        let expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        match expected.get(&node) {
            Some(expected) if *expected != found => Err(format!(
                "node {node} runs on another directory than it was added with: it was wiped or \
                 copied; replace it with `trine cluster replace`"
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_on_another_directory_is_refused_and_a_stranger_is_not() {
        let incarnations = Incarnations::new([1; 16]);
        incarnations.expect(2, [2; 16]);
        assert_eq!(incarnations.check(2, [2; 16]), Ok(()));
        assert_eq!(incarnations.check(3, [9; 16]), Ok(()));
        let refused = incarnations.check(2, [9; 16]).expect_err("wiped");
        assert!(refused.contains("node 2") && refused.contains("wiped"), "{refused}");
        incarnations.replace(HashMap::new());
        assert_eq!(incarnations.check(2, [9; 16]), Ok(()));
    }
}
