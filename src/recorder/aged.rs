//! [`Aged`]: a map of bounded weight that forgets what was not used for longest, by halves.
//!
//! New entries go into the young half. When that is full, it becomes the old one, and the old one is forgotten but for what is
//! asked to be kept. What is used moves to the young half.

use foldhash::fast::RandomState;
use std::collections::HashMap;
use std::hash::Hash;

/// See the module.
#[derive(Debug)]
pub struct Aged<K, V> {
    young: HashMap<K, (V, usize), RandomState>,
    old: HashMap<K, (V, usize), RandomState>,
    weight: usize,
    /// Weight of a half.
    half: usize,
}

impl<K: Hash + Eq + Copy, V> Aged<K, V> {
    /// An empty map whose halves weigh `half` each, and what is kept.
    pub fn new(half: usize) -> Self {
        Self { young: HashMap::default(), old: HashMap::default(), weight: 0, half }
    }

    /// Adds or replaces. When the young half is full, the old entries for which `keep` answers true stay.
    pub fn insert(&mut self, key: K, value: V, weight: usize, keep: impl Fn(&K) -> bool) {
        if self.weight >= self.half {
            let mut forgotten = std::mem::replace(&mut self.old, std::mem::take(&mut self.young));
            forgotten.retain(|key, _| keep(key));
            self.weight = forgotten.values().map(|(_, weight)| weight).sum();
            self.young = forgotten;
        }
        self.old.remove(&key);
        self.weight += weight;
        if let Some((_, before)) = self.young.insert(key, (value, weight)) {
            self.weight -= before;
        }
    }

    /// The value of `key`, which counts as used.
    #[inline]
    pub fn get(&mut self, key: &K) -> Option<&mut V> {
        if !self.young.contains_key(key) {
            let (value, weight) = self.old.remove(key)?;
            self.weight += weight;
            self.young.insert(*key, (value, weight));
        }
        self.young.get_mut(key).map(|(value, _)| value)
    }

    /// Whether there is a value. This is no use of it.
    pub fn contains(&self, key: &K) -> bool {
        self.young.contains_key(key) || self.old.contains_key(key)
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_or_kept_stays_and_the_rest_is_bounded() {
        let mut map = Aged::new(100);
        for n in 0..1000 {
            map.insert(n, n, 1, |key| *key == 7);
            assert_eq!(map.get(&3).copied(), (n >= 3).then_some(3));
            assert!(map.len() <= 202, "{}", map.len());
        }
        assert!(map.contains(&7) && map.contains(&999));
        assert!(!map.contains(&8) && !map.contains(&500));
    }

    #[test]
    fn a_replaced_value_weighs_once() {
        let mut map = Aged::new(10);
        for n in 0..100 {
            map.insert(1, n, 5, |_| false);
        }
        assert_eq!((map.len(), map.get(&1).copied()), (1, Some(99)));
    }
}
