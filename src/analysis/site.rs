//! Sums by [`Site`].

use crate::capture::{Site, Totals};
use foldhash::fast::RandomState;
use std::collections::HashMap;

/// What a site has of whatever was asked for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SiteTotals {
    /// The site.
    pub site: Site,
    /// Its part.
    pub totals: Totals,
}

/// Sites numbered in the order they are seen.
#[derive(Default)]
pub(super) struct SiteTable {
    ids: HashMap<Site, u32, RandomState>,
    sites: Vec<Site>,
}

impl SiteTable {
    pub(super) fn id(&mut self, site: Site) -> usize {
        let next = self.sites.len() as u32;
        let id = *self.ids.entry(site).or_insert(next);
        if id == next {
            self.sites.push(site);
        }
        id as usize
    }

    pub(super) fn sites(&self) -> &[Site] {
        &self.sites
    }
}

/// Adds up totals that come in any order, biggest first (ties by site, so that output is stable).
pub(super) fn sum(parts: impl Iterator<Item = (Site, Totals)>) -> Vec<SiteTotals> {
    let mut sums: HashMap<Site, Totals, RandomState> = HashMap::default();
    for (site, totals) in parts {
        sums.entry(site).or_default().add(totals);
    }
    sorted(sums.into_iter())
}

/// Biggest first, without the empty ones.
pub(super) fn sorted(parts: impl Iterator<Item = (Site, Totals)>) -> Vec<SiteTotals> {
    let mut rows: Vec<SiteTotals> = parts
        .filter(|(_, totals)| !totals.is_empty())
        .map(|(site, totals)| SiteTotals { site, totals })
        .collect();
    rows.sort_unstable_by(|a, b| b.totals.compare(&a.totals).then(a.site.cmp(&b.site)));
    rows
}
